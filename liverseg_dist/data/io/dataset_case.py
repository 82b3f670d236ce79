"""Cases of a data set: built from the files that `dataset.json` lists, or paired by file name.

`dataset_index.read_dataset` calls one of the two. Problems of single files become findings of their
case, so that one missing file does not stop the others.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from liverseg_dist.config import CT_CHANNELS, ChannelConfig
from liverseg_dist.data.findings import Finding
from liverseg_dist.data.io.channel_files import (
    ChannelFiles,
    group_channel_files,
    order_named_files,
    report_missing_channels,
)
from liverseg_dist.data.io.dataset_folder import (
    SUBFOLDERS,
    FileFinder,
    describe_contents,
    is_file,
    list_entries,
)
from liverseg_dist.data.io.dataset_json import INDEX_FILE, ListedScan
from liverseg_dist.data.io.dicom_series import DicomScan
from liverseg_dist.data.io.scan_reader import ScanSource
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
    image: ScanSource
    """Source of the first channel that the scan has."""
    label: Path | None = None
    findings: tuple[Finding, ...] = ()
    images: ChannelFiles = ()
    """One file for each channel, None for an absent one; or one file that holds all channels."""
    source: int = 0
    """Position of the case's source in `DatasetIndex.sources`."""
    structure_files: tuple[tuple[str, Path], ...] = ()
    """(structure, file) where each structure has a file of its own; `label` is then None."""
    annotated: tuple[str, ...] | None = None
    """Structures that `dataset.json` lists as annotated in the case; None: it lists none."""

    def __post_init__(self) -> None:
        if not self.images:
            object.__setattr__(self, "images", (self.image,))

    @property
    def files(self) -> tuple[ScanSource, ...]:
        """The sources of all channels that the scan has."""
        return tuple(path for path in self.images if path is not None)

    @property
    def has_label(self) -> bool:
        return self.label is not None or bool(self.structure_files)

    @property
    def patient(self) -> str:
        """Pseudonym of the patient, where the source states one (DICOM); else ""."""
        return self.image.patient if isinstance(self.image, DicomScan) else ""

    @property
    def label_name(self) -> str:
        """The label file for messages; of DICOM cases without its path, which may name a patient."""
        if self.label is None:
            return ""
        is_dicom = isinstance(self.image, DicomScan)
        return f"label of {self.case_id}" if is_dicom else format_path_end(self.label)

    @property
    def label_files(self) -> tuple[Path, ...]:
        """All files of the label, in the order in which they are read."""
        if self.label is not None:
            return (self.label,)
        return tuple(path for _, path in self.structure_files)


Cases = tuple[DatasetCase, ...]


def build_listed_cases(
    training: Sequence[ListedScan],
    test: Sequence[ListedScan],
    channels: Sequence[ChannelConfig] = CT_CHANNELS,
) -> tuple[Cases, Cases]:
    """The cases (training, test) of the files that the index lists.

    The ids follow the names in the index, also where a file was found under a similar name.

    Raises:
        UserError: An entry lists other channels than the data set has.
    """
    scans = [*training, *test]
    label_ids = set()
    for scan in scans:
        if scan.label is not None:
            label_ids.add(derive_scan_id(scan.label.name, keep_channel=True))
    ids = assign_scan_ids((scan.images[0].name for scan in scans), label_ids).ids
    # One finder for all: folders with thousands of files are listed once.
    finder = FileFinder()
    cases = []
    for scan in scans:
        # A file that looks like a further channel is a scan of its own if the index lists it.
        name = scan.images[0].name
        case_id = ids.get(name) or derive_scan_id(name, keep_channel=len(channels) == 1)
        cases.append(_build_listed_case(case_id, scan, channels, finder))
    return tuple(cases[: len(training)]), tuple(cases[len(training) :])


def _build_listed_case(
    case_id: str, scan: ListedScan, channels: Sequence[ChannelConfig], finder: FileFinder
) -> DatasetCase:
    images, findings = _find_images(scan, channels, finder)
    label_file = None
    if scan.label is not None:
        label_file, problem = finder.find_file(scan.label)
        if problem is not None:
            message = f"{INDEX_FILE} names {format_path_end(scan.label)}, {problem}"
            findings.append(Finding("warning", "label_missing", message))
            label_file = None
    return _make_case(case_id, images, label_file, findings)


def _make_case(
    case_id: str, images: ChannelFiles, label: Path | None, findings: Sequence[Finding]
) -> DatasetCase:
    first = next(path for path in images if path is not None)
    return DatasetCase(case_id, first, label, tuple(findings), images)


def _find_images(
    scan: ListedScan, channels: Sequence[ChannelConfig], finder: FileFinder
) -> tuple[ChannelFiles, list[Finding]]:
    """The files of all channels; the first listed file with an error if there is none."""
    listed: tuple[Path | None, ...] = scan.images
    if scan.channel_names is not None:
        named = list(zip(scan.channel_names, scan.images, strict=True))
        listed = order_named_files(named, channels, INDEX_FILE)
    elif len(listed) > 1 and len(listed) != len(channels):
        raise UserError(
            f"{INDEX_FILE}: {format_path_end(scan.images[0])} is one of {len(listed)} files of a "
            f"scan, but the data set has {len(channels)} channel(s); name the channels in "
            "channel_names or in convert.channels"
        )
    if len(listed) == 1 and len(channels) > 1:
        found_channels = finder.find_channels(scan.images[0], len(channels))
        if found_channels is not None:
            files = tuple(found_channels)
            return files, report_missing_channels(files, channels)
    found: list[Path | None] = []
    problems = []
    for path in listed:
        file, problem = (None, None) if path is None else finder.find_file(path)
        if problem is not None and path is not None:
            problems.append(f"{INDEX_FILE} names {format_path_end(path)}, {problem}")
            file = None
        found.append(file)
    if not any(found):
        return scan.images[:1], [Finding("error", "image_missing", problems[0])]
    files = tuple(found)
    # With several files the case is stored without the channels whose files are missing.
    missing = [Finding("warning", "channel_missing", problem) for problem in problems]
    return files, missing or report_missing_channels(files, channels)


def pair_files_by_name(
    folder: Path, channels: Sequence[ChannelConfig] = CT_CHANNELS
) -> tuple[Cases, Cases, list[Finding]]:
    """The cases (training, test) of the files in imagesTr, imagesTs and labelsTr, and findings.

    Args:
        folder: The data set.
        channels: Its channels: with more than one, `_0000`, `_0001`, ... belong to one scan.

    Raises:
        UserError: No image, two labels of the same case, or a channel that the data set does not
            have.
    """
    images, test_images, label_files = (_list_scans(folder / name) for name in SUBFOLDERS)
    has_index = (folder / INDEX_FILE).exists()
    reason = f"{INDEX_FILE} lists no scans" if has_index else f"no {INDEX_FILE}"
    if not images and not test_images:
        contents = describe_contents(folder)
        raise UserError(
            f"{printable(folder)}: {reason}, and no scans (.nii, .nii.gz) in imagesTr/ or "
            f"imagesTs/; expected a Task03_Liver folder{'; ' if contents else ''}{contents}"
        )
    labels = _group_labels_by_key(folder, label_files)
    # Labels have no channel, so their numbers show which numbers are case numbers.
    label_ids = {derive_scan_id(path.name, keep_channel=True) for path in label_files}
    scans, further = _group_scans(folder, images, label_ids, channels)
    test_scans, further_test = _group_scans(folder, test_images, label_ids, channels)
    training = []
    for case_id, files in scans:
        training.append(_build_paired_case(case_id, files, labels, channels))
    test = []
    for case_id, files in test_scans:
        test.append(_make_case(case_id, files, None, report_missing_channels(files, channels)))
    message = f"{reason}: images and labels are paired by file name"
    notes = [
        # nnU-Net's dataset.json never lists scans: nothing is wrong with such a data set.
        Finding("info" if has_index else "warning", "no_index", message),
        *_report_channels([*further, *further_test]),
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


def _group_scans(
    folder: Path,
    files: Sequence[Path],
    label_ids: Collection[str],
    channels: Sequence[ChannelConfig],
) -> tuple[list[tuple[str, ChannelFiles]], tuple[str, ...]]:
    """(id, files) of each scan, and the names of files that are channels the data set has not."""
    if len(channels) > 1:
        try:
            return group_channel_files(files, label_ids, channels), ()
        except UserError as error:
            raise UserError(f"{printable(folder)}: {error}") from None
    names = assign_scan_ids((path.name for path in files), label_ids)
    # Further channels have no id and become a finding.
    scans: list[tuple[str, ChannelFiles]] = []
    for path in files:
        if path.name in names.ids:
            scans.append((names.ids[path.name], (path,)))
    return scans, names.channels


def _build_paired_case(
    case_id: str,
    files: ChannelFiles,
    labels: dict[str, Path],
    channels: Sequence[ChannelConfig],
) -> DatasetCase:
    findings = report_missing_channels(files, channels)
    label = labels.get(derive_pairing_key(case_id))
    case = _make_case(case_id, files, label, findings)
    if label is not None:
        return case
    message = f"no label of that name for {format_path_end(case.image)}"
    note = Finding("warning", "label_missing", message)
    return replace(case, findings=(*case.findings, note))


def _report_channels(channels: Sequence[str]) -> list[Finding]:
    if not channels:
        return []
    names = list_some([printable(name) for name in channels])
    message = (
        "further channels of a scan (nnU-Net's _0001 and so on) are not read, because the data "
        f"set names one channel: {names}; name them in {INDEX_FILE} or convert.channels, or "
        "rename them if they are separate scans"
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


def format_path_end(path: ScanSource) -> str:
    """Folder and name of a file, printable: `imagesTr/liver_0.nii.gz`; the name of a DICOM scan."""
    if isinstance(path, DicomScan):
        return path.name
    return printable(f"{path.parent.name}/{path.name}")
