"""Join several data sets to one, for a store whose cases are labelled in part.

Each source keeps its own label numbers (`DatasetIndex.sources`); `label_plan` joins them by the
names of their structures.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from liverseg_dist.config import ChannelConfig
from liverseg_dist.data.findings import Finding
from liverseg_dist.data.io.dataset_case import DatasetCase
from liverseg_dist.data.io.dataset_index import DatasetIndex, read_dataset
from liverseg_dist.data.io.dicom_sources import DicomOptions
from liverseg_dist.errors import UserError, printable
from liverseg_dist.texts.names import clean_text, fold_id


def read_datasets(
    folders: Sequence[Path],
    channels: tuple[ChannelConfig, ...] | None = None,
    dicom: DicomOptions | None = None,
) -> DatasetIndex:
    """Read one data set, or join several.

    The ids of joined cases start with the name of their folder, so that they are unique.

    Args:
        folders: The data sets.
        channels: `convert.channels`.
        dicom: How DICOM series are selected and named; None for the defaults.

    Raises:
        UserError: A folder is no data set, two folders have the same name, or the data sets have
            different channels.
    """
    if len(folders) == 1:
        return read_dataset(folders[0], channels, dicom)
    names: dict[str, Path] = {}
    for folder in folders:
        name = clean_text(folder.resolve().name)
        other = names.setdefault(fold_id(name), folder)
        if other is not folder:
            raise UserError(
                f"{printable(other)} and {printable(folder)}: two data sets of the same folder name; "
                "case ids start with it, so rename one"
            )
    indexes = [read_dataset(folder, channels, dicom) for folder in folders]
    first = indexes[0]
    for folder, index in zip(folders, indexes, strict=True):
        if index.channels != first.channels:
            raise UserError(
                f"{printable(folder)}: its channels are {_describe_channels(index)}, those of "
                f"{printable(folders[0])} are {_describe_channels(first)}; name them in "
                "convert.channels"
            )
    training: list[DatasetCase] = []
    test: list[DatasetCase] = []
    notes: list[Finding] = []
    for number, (folder, index) in enumerate(zip(folders, indexes, strict=True)):
        name = clean_text(folder.resolve().name)
        for case in index.training:
            training.append(replace(case, case_id=f"{name}_{case.case_id}", source=number))
        for case in index.test:
            test.append(replace(case, case_id=f"{name}_{case.case_id}", source=number))
        for note in index.notes:
            notes.append(replace(note, message=f"{printable(name)}: {note.message}"))
    _check_unique([*training, *test])
    return DatasetIndex(
        " + ".join(index.name for index in indexes),
        tuple(sorted(training, key=lambda case: case.case_id)),
        tuple(sorted(test, key=lambda case: case.case_id)),
        tuple(notes),
        first.channels,
        tuple(source for index in indexes for source in index.sources),
    )


def _check_unique(cases: Sequence[DatasetCase]) -> None:
    seen: set[str] = set()
    for case in cases:
        # `a_b` + `c` and `a` + `b_c` give the same id.
        if fold_id(case.case_id) in seen:
            raise UserError(f"two scans are called {printable(case.case_id)}; rename a folder")
        seen.add(fold_id(case.case_id))


def _describe_channels(index: DatasetIndex) -> str:
    return ", ".join(
        f"{printable(channel.name)} ({channel.modality})" for channel in index.channels
    )
