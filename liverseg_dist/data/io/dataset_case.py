"""Cases of a data set: built from the files that `dataset.json` lists, or paired by file name.

`dataset_index.read_dataset` calls one of the two. Problems of single files become findings of their
case, so that one missing file does not stop the others.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from liverseg_dist.data.findings import Finding
from liverseg_dist.data.io.dataset_folder import (
    SUBFOLDERS,
    FileFinder,
    describe_contents,
    is_file,
    list_entries,
)
from liverseg_dist.data.io.dataset_json import INDEX_FILE, FilePair
from liverseg_dist.errors import UserError, printable
from liverseg_dist.texts.names import (
    assign_scan_ids,
    derive_pairing_key,
    derive_scan_id,
    is_scan_name,
    list_some,
)


@dataclass(frozen=True)
class DatasetCase:
    """One scan of a data set.

    `label` is None if there is none, or if the file is missing (then with a finding).
    """

    case_id: str
    image: Path
    label: Path | None = None
    findings: tuple[Finding, ...] = ()
    source: int = 0
    """Position of the case's source in `DatasetIndex.sources`."""
    structure_files: tuple[tuple[str, Path], ...] = ()
    """(structure, file) where each structure has a file of its own; `label` is then None."""
    annotated: tuple[str, ...] | None = None
    """Structures that `dataset.json` lists as annotated in the case; None: it lists none."""

    @property
    def has_label(self) -> bool:
        return self.label is not None or bool(self.structure_files)

    @property
    def label_files(self) -> tuple[Path, ...]:
        """All files of the label, in the order in which they are read."""
        if self.label is not None:
            return (self.label,)
        return tuple(path for _, path in self.structure_files)


Cases = tuple[DatasetCase, ...]


def build_listed_cases(
    training: Sequence[FilePair], test: Sequence[FilePair]
) -> tuple[Cases, Cases]:
    """The cases (training, test) of the files that the index lists.

    The ids follow the names in the index, also where a file was found under a similar name.
    """
    pairs = [*training, *test]
    label_ids = set()
    for _, label in pairs:
        if label is not None:
            label_ids.add(derive_scan_id(label.name, keep_channel=True))
    ids = assign_scan_ids((image.name for image, _ in pairs), label_ids).ids
    # One finder for all: folders with thousands of files are listed once.
    finder = FileFinder()
    cases = []
    for image, label in pairs:
        # A file that looks like a further channel is a scan of its own if the index lists it.
        case_id = ids.get(image.name) or derive_scan_id(image.name, keep_channel=True)
        cases.append(_build_listed_case(case_id, image, label, finder))
    return tuple(cases[: len(training)]), tuple(cases[len(training) :])


def _build_listed_case(
    case_id: str, image: Path, label: Path | None, finder: FileFinder
) -> DatasetCase:
    findings = []
    image_file, problem = finder.find_file(image)
    if problem is not None:
        message = f"{INDEX_FILE} names {format_path_end(image)}, {problem}"
        findings.append(Finding("error", "image_missing", message))
    label_file = None
    if label is not None:
        label_file, problem = finder.find_file(label)
        if problem is not None:
            message = f"{INDEX_FILE} names {format_path_end(label)}, {problem}"
            findings.append(Finding("warning", "label_missing", message))
            label_file = None
    return DatasetCase(case_id, image_file, label_file, tuple(findings))


def pair_files_by_name(folder: Path) -> tuple[Cases, Cases, list[Finding]]:
    """The cases (training, test) of the files in imagesTr, imagesTs and labelsTr, and findings.

    Raises:
        UserError: No image, or two labels of the same case.
    """
    images, test_images, label_files = (_list_scans(folder / name) for name in SUBFOLDERS)
    reason = (
        f"{INDEX_FILE} lists no scans" if (folder / INDEX_FILE).exists() else f"no {INDEX_FILE}"
    )
    if not images and not test_images:
        contents = describe_contents(folder)
        raise UserError(
            f"{printable(folder)}: {reason}, and no scans (.nii, .nii.gz) in imagesTr/ or "
            f"imagesTs/; expected a Task03_Liver folder{'; ' if contents else ''}{contents}"
        )
    labels = _group_labels_by_key(folder, label_files)
    # Labels have no channel, so their numbers show which numbers are case numbers.
    label_ids = {derive_scan_id(path.name, keep_channel=True) for path in label_files}
    names = assign_scan_ids((path.name for path in images), label_ids)
    test_names = assign_scan_ids((path.name for path in test_images), label_ids)
    training = []
    for path in images:
        # Further channels have no id and become a finding.
        if path.name in names.ids:
            training.append(_build_paired_case(path, names.ids[path.name], labels))
    test = []
    for path in test_images:
        if path.name in test_names.ids:
            test.append(DatasetCase(test_names.ids[path.name], path))
    message = f"{reason}: images and labels are paired by file name"
    notes = [
        Finding("warning", "no_index", message),
        *_report_channels([*names.channels, *test_names.channels]),
        *_report_unpaired_labels(training, label_files),
    ]
    return tuple(training), tuple(test), notes


def _list_scans(folder: Path) -> list[Path]:
    return [path for path in list_entries(folder) if is_scan_name(path.name) and is_file(path)]


def _group_labels_by_key(folder: Path, files: Iterable[Path]) -> dict[str, Path]:
    labels: dict[str, Path] = {}
    for path in files:
        key = derive_pairing_key(derive_scan_id(path.name, keep_channel=True))
        if key in labels:
            both = f"{format_path_end(labels[key])} and {format_path_end(path)}"
            raise UserError(f"{printable(folder)}: {both} are labels of the same case; remove one")
        labels[key] = path
    return labels


def _build_paired_case(image: Path, case_id: str, labels: dict[str, Path]) -> DatasetCase:
    label = labels.get(derive_pairing_key(case_id))
    if label is not None:
        return DatasetCase(case_id, image, label)
    message = f"no label of that name for {format_path_end(image)}"
    return DatasetCase(case_id, image, None, (Finding("warning", "label_missing", message),))


def _report_channels(channels: Sequence[str]) -> list[Finding]:
    if not channels:
        return []
    names = list_some([printable(name) for name in channels])
    message = (
        "further channels of a scan (nnU-Net's _0001 and so on) are not read, because a CT has "
        f"one: {names}; if they are separate scans, rename them"
    )
    return [Finding("warning", "channels", message)]


def _report_unpaired_labels(
    cases: Iterable[DatasetCase], label_files: Iterable[Path]
) -> list[Finding]:
    paired = {case.label for case in cases}
    unpaired = [printable(path.name) for path in label_files if path not in paired]
    if not unpaired:
        return []
    message = f"{len(unpaired)} label(s) without an image: {list_some(unpaired)}"
    return [Finding("warning", "label_without_image", message)]


def format_path_end(path: Path) -> str:
    """Folder and name of a file, printable: `imagesTr/liver_0.nii.gz`."""
    return printable(f"{path.parent.name}/{path.name}")
