"""Read a folder in the layout of the Medical Segmentation Decathlon (Task03_Liver).

    dataset.json  imagesTr/liver_0.nii.gz  labelsTr/liver_0.nii.gz  imagesTs/liver_1.nii.gz

`read_dataset(folder)` lists the cases without opening a scan. Without a `dataset.json`, or with one
that lists no scans (nnU-Net's since version 2), images and labels are paired by file name. Case ids
follow `texts.names`.

A folder with one folder per case and one file per structure is read too (`structure_files`), and one
with a DICOM series per case (`dicom_dataset`).

`dataset.json` is untrusted: its paths must not be absolute or leave the folder. Links in the folder
are followed, because data sets on clusters often are folders of links; a warning names the cases
whose links lead out of the folder. A listed file that is missing becomes a finding of its case and
does not stop the other cases.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from liverseg_dist.config import CT_CHANNELS, ChannelConfig
from liverseg_dist.data.findings import Finding, is_valid_case_id
from liverseg_dist.data.io.dataset_case import (
    Cases,
    DatasetCase,
    build_listed_cases,
    format_path_end,
    pair_files_by_name,
)
from liverseg_dist.data.io.dataset_folder import find_unread_files
from liverseg_dist.data.io.dataset_json import INDEX_FILE, read_index
from liverseg_dist.data.io.dicom_dataset import is_dicom_dataset, list_dicom_cases
from liverseg_dist.data.io.dicom_sources import DicomOptions
from liverseg_dist.data.io.source_labels import SourceLabels
from liverseg_dist.data.io.structure_files import is_structure_folder, list_structure_cases
from liverseg_dist.errors import UserError, printable
from liverseg_dist.texts.names import fold_id, list_some

MAX_ID_BYTES = 200
MAX_NAME_CHARACTERS = 200
MAX_LINKED_SHOWN = 3


@dataclass(frozen=True)
class DatasetIndex:
    """The cases of a data set, each part sorted by id."""

    name: str
    training: Cases
    test: Cases
    notes: tuple[Finding, ...] = ()
    """Findings about the data set as a whole."""
    channels: tuple[ChannelConfig, ...] = CT_CHANNELS
    """Channels of the images."""
    sources: tuple[SourceLabels, ...] = (SourceLabels(""),)
    """Labels of each source; more than one for joined data sets (`join_datasets`)."""


def read_dataset(
    folder: Path | str,
    channels: tuple[ChannelConfig, ...] | None = None,
    dicom: DicomOptions | None = None,
) -> DatasetIndex:
    """List the cases of a data set.

    Args:
        folder: A folder with `dataset.json`, or with imagesTr, labelsTr and imagesTs.
        channels: Channels of the images (`convert.channels`); None: as `dataset.json` names them,
            else one of CT.
        dicom: How DICOM series are selected and named; None for the defaults.

    Raises:
        UserError: The folder is not such a data set, or two cases have the same id.
    """
    folder = Path(folder)
    _check_folder(folder)
    index = folder / INDEX_FILE
    name = folder.resolve().name
    notes: list[Finding] = []
    listing_file = None
    labels = SourceLabels(printable(folder))
    if not index.exists() and is_structure_folder(folder):
        training, labels, channels = list_structure_cases(folder, channels)
        _check_ids(folder, training)
        notes += _find_outside_links(folder, training)
        return DatasetIndex(name, training, (), tuple(notes), channels, (labels,))
    # A broken link is reported as a bad index, not treated as a missing one.
    if index.exists() or index.is_symlink():
        content = read_index(folder, index, channels)
        notes += content.notes
        labels = content.labels
        channels = content.channels
        if content.lists_scans:
            listing_file = INDEX_FILE
            name = printable(content.name or name)[:MAX_NAME_CHARACTERS]
            training, test = build_listed_cases(content.training, content.test, channels)
    channels = channels or CT_CHANNELS
    if listing_file is None and is_dicom_dataset(folder):
        cases_of_folder = list_dicom_cases(folder, channels, dicom)
        training, test = cases_of_folder.training, cases_of_folder.test
        labels = cases_of_folder.labels or labels
        # Images and labels are in the folders of their cases: nothing else is looked for.
        training = list_annotated(labels, _sort_cases(training))
        _check_ids(folder, [*training, *test])
        test = _sort_cases(test)
        return DatasetIndex(name, training, test, tuple(notes), channels, (labels,))
    if listing_file is None:
        training, test, pairing_notes = pair_files_by_name(folder, channels)
        notes += pairing_notes
    training, test = _sort_cases(training), _sort_cases(test)
    training, test = list_annotated(labels, training), list_annotated(labels, test)
    cases = [*training, *test]
    _check_ids(folder, cases)
    notes += find_unread_files(folder, _collect_files(cases), listing_file)
    notes += _find_outside_links(folder, cases)
    return DatasetIndex(name, training, test, tuple(notes), channels, (labels,))


def list_annotated(labels: SourceLabels, cases: Iterable[DatasetCase]) -> Cases:
    """The cases with the structures that `dataset.json` lists for them."""
    listed = []
    for case in cases:
        for pattern, names in labels.annotated:
            if fnmatchcase(case.case_id, pattern):
                case = replace(case, annotated=names)
                break
        listed.append(case)
    return tuple(listed)


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise UserError(
            f"{printable(folder)}: no such folder; a Task03_Liver folder holds dataset.json and "
            "imagesTr/"
        )
    if not folder.is_dir():
        raise UserError(
            f"{printable(folder)}: not a folder; give the one that holds dataset.json and imagesTr/"
        )


def _sort_cases(cases: Iterable[DatasetCase]) -> Cases:
    return tuple(sorted(cases, key=lambda case: case.case_id))


def _collect_files(cases: Iterable[DatasetCase]) -> set[Path]:
    files: set[Path] = set()
    for case in cases:
        files.update(path for path in case.files if isinstance(path, Path))
        files.update(case.label_files)
    return files


def _check_ids(folder: Path, cases: Iterable[DatasetCase]) -> None:
    """Raise `UserError` for an id that cannot name a file, and for two equal ids.

    Ids that differ only in upper and lower case count as equal: some file systems do not
    distinguish them.
    """
    # Over both parts: a case must not be in training and test.
    seen: dict[str, DatasetCase] = {}
    for case in cases:
        name = case.case_id
        if not is_valid_case_id(name) or len(name.encode("utf-8", "replace")) > MAX_ID_BYTES:
            raise UserError(
                f"{printable(folder)}: '{printable(name)}' cannot name a case; rename the file"
            )
        other = seen.setdefault(fold_id(name), case)
        if other is not case:
            both = f"{format_path_end(other.image)} and {format_path_end(case.image)}"
            hint = "" if other.case_id == name else " (upper and lower case count as equal)"
            raise UserError(
                f"{printable(folder)}: two scans are called {printable(name)}{hint}, {both}; "
                "case names must differ: rename or remove one"
            )


def _find_outside_links(folder: Path, cases: Iterable[DatasetCase]) -> list[Finding]:
    """A downloaded data set may link to scans that its user did not intend to convert."""
    # The folder itself may be reached by a link.
    home = os.path.realpath(folder)
    linked = set()
    for case in cases:
        for path in _collect_files([case]):
            if os.path.commonpath([home, os.path.realpath(path)]) != home:
                linked.add(case.case_id)
    if not linked:
        return []
    names = list_some([printable(name) for name in sorted(linked)], MAX_LINKED_SHOWN)
    message = f"files of {len(linked)} scan(s) are links out of the folder: {names}"
    return [Finding("warning", "link_outside", message)]
