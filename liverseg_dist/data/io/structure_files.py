"""Data sets with one folder per case and one file per structure (TotalSegmentator's layout).

    s0001/ct.nii.gz  s0001/segmentations/liver.nii.gz  s0001/segmentations/spleen.nii.gz

`list_structure_cases` lists the cases without opening a file; `read_structure_label` joins the
files of one case to a label in class values. Files that `convert.labels` does not use are not read.
A structure without a file is not annotated in that case.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from liverseg_dist.config import CT_CHANNELS, ChannelConfig
from liverseg_dist.data.findings import Finding, ScanFileError
from liverseg_dist.data.io.channel_files import report_missing_channels
from liverseg_dist.data.io.dataset_case import Cases, DatasetCase
from liverseg_dist.data.io.dataset_folder import is_file, list_entries
from liverseg_dist.data.io.dicom_segments import read_segments
from liverseg_dist.data.io.nifti import ScanFile, read_scan_file
from liverseg_dist.data.io.source_labels import SourceLabels, labels_of_files
from liverseg_dist.data.label_mapping import LabelMapping
from liverseg_dist.errors import UserError, printable
from liverseg_dist.labels import BACKGROUND
from liverseg_dist.texts.names import clean_text, is_scan_name, list_some, strip_suffix
from liverseg_dist.volume import Grid, Volume

CHANNEL_OF_FILE = {
    "ct": CT_CHANNELS[0],
    "image": CT_CHANNELS[0],
    "mri": ChannelConfig(name="MR", modality="MR", intensity="zscore"),
    "mr": ChannelConfig(name="MR", modality="MR", intensity="zscore"),
}
"""Channel by the name of a case's image, without suffix."""
SEGMENTATIONS = "segmentations"
MAX_PAIRS_SHOWN = 5


def is_structure_folder(folder: Path) -> bool:
    """Whether a folder holds at least one case in this layout."""
    if (folder / "imagesTr").exists():
        return False
    return any(
        (entry / SEGMENTATIONS).is_dir() and _find_images(entry) for entry in list_entries(folder)
    )


def list_structure_cases(
    folder: Path, channels: tuple[ChannelConfig, ...] | None = None
) -> tuple[Cases, SourceLabels, tuple[ChannelConfig, ...]]:
    """The cases of a folder, the labels that their files name, and the channels of the images.

    Args:
        folder: The data set.
        channels: `convert.channels`; None: those that the images' names stand for.

    Raises:
        UserError: The files name no structure, or more than a label can hold; or no image has the
            name of a channel.
    """
    images_of = {entry: _find_images(entry) for entry in list_entries(folder)}
    if channels is None:
        found = dict.fromkeys(name for images in images_of.values() for name in images)
        channels = tuple(dict.fromkeys(CHANNEL_OF_FILE[name] for name in found))
    cases = []
    names: set[str] = set()
    for entry, images in images_of.items():
        files = _order_by_channel(images, channels)
        if not any(files):
            continue
        structures = []
        for path in list_entries(entry / SEGMENTATIONS):
            if is_scan_name(path.name) and is_file(path):
                structures.append((clean_text(strip_suffix(path.name)), path))
        names |= {name for name, _ in structures}
        findings = report_missing_channels(files, channels)
        if not structures:
            message = f"no file of a structure in {printable(entry.name)}/{SEGMENTATIONS}/"
            findings = [*findings, Finding("warning", "label_missing", message)]
        first = next(path for path in files if path is not None)
        case = DatasetCase(clean_text(entry.name), first, None, tuple(findings), files)
        cases.append(replace(case, structure_files=tuple(structures)))
    if not cases:
        wanted = list_some([printable(channel.name) for channel in channels])
        raise UserError(
            f"{printable(folder)}: no case has an image of the channels {wanted}; images are called "
            f"{list_some([f'{name}.nii.gz' for name in CHANNEL_OF_FILE])}"
        )
    return tuple(cases), labels_of_files(printable(folder), sorted(names)), channels


def _find_images(folder: Path) -> dict[str, Path]:
    """The images of a case by their names."""
    images: dict[str, Path] = {}
    for path in list_entries(folder):
        name = strip_suffix(path.name).lower()
        if is_scan_name(path.name) and name in CHANNEL_OF_FILE:
            images.setdefault(name, path)
    return images


def _order_by_channel(
    images: Mapping[str, Path], channels: tuple[ChannelConfig, ...]
) -> tuple[Path | None, ...]:
    """One image for each channel, by name or modality; None for an absent one."""
    files: list[Path | None] = []
    for channel in channels:
        found = None
        for name, path in images.items():
            known = CHANNEL_OF_FILE[name]
            if channel.name.casefold() == name or channel.modality == known.modality:
                found = found or path
        files.append(found)
    return tuple(files)


def read_structure_label(
    files: Sequence[tuple[str, Path]], mapping: LabelMapping, image: Grid | None = None
) -> tuple[Volume | None, list[Finding]]:
    """Join the files of a case to one label in class values.

    Containers are painted before what they contain, then structures in the order of the scheme, so
    that the later of two overlapping structures wins.

    Args:
        files: (structure, file).
        mapping: Of the source.
        image: Grid of the image; needed where the files are DICOM SEGs.

    Returns:
        The label, None if the case has no file of any structure of the store; and findings: those
        of the files' headers, and overlaps.

    Raises:
        ScanFileError: A file is unreadable, has values of several structures, or another grid.
    """
    class_of_file = dict(mapping.class_of_file)
    wanted = [(name, path) for name, path in files if class_of_file.get(name, BACKGROUND)]
    structures_of = _structures_by_class(mapping)

    def paint_position(file: tuple[str, Path]) -> tuple[int, int]:
        number = class_of_file[file[0]]
        return len(structures_of[number]), number

    label: Volume | None = None
    findings: list[Finding] = []
    overlaps: dict[tuple[int, int], int] = {}
    for name, path in sorted(wanted, key=paint_position):
        file = _read_structure(name, path, image)
        # The header of each file repeats what the first one has; one report is enough.
        if label is None:
            findings += file.notes
            label = file.volume.with_voxels(np.zeros(file.volume.shape, np.uint8))
        elif not file.volume.grid.matches(label.grid):
            raise ScanFileError(path, "structure_grid", _describe_grids(file.volume, label))
        mask = _read_mask(file.volume, path)
        number = class_of_file[name]
        covered = np.bincount(label.voxels[mask], minlength=1)
        for other in np.flatnonzero(covered):
            if not structures_of[int(other)] <= structures_of[number]:
                pair = (int(other), number)
                overlaps[pair] = overlaps.get(pair, 0) + int(covered[other])
        label.voxels[mask] = number
    return label, [*findings, *_report_overlaps(overlaps, mapping)]


def _read_structure(name: str, path: Path, image: Grid | None) -> ScanFile:
    if is_scan_name(path.name):
        return read_scan_file(path, "label")
    if image is None:
        raise ScanFileError(path, "dicom_seg_grid", "a DICOM SEG is read with its image only")
    return ScanFile(read_segments(path, name, image), ())


def _structures_by_class(mapping: LabelMapping) -> list[frozenset[str]]:
    """Names of the structures that each class value belongs to."""
    result = []
    for number in range(mapping.scheme.num_classes):
        names = [item.name for item in mapping.scheme.structures if number in item.values]
        result.append(frozenset(names))
    return result


def _read_mask(volume: Volume, path: Path) -> np.ndarray:
    values = np.flatnonzero(np.bincount(volume.voxels.reshape(-1)))
    foreground = [int(value) for value in values if value != BACKGROUND]
    if len(foreground) > 1:
        reason = (
            f"has the values {list_some(list(map(str, foreground)))}; the file of a structure has "
            "0 and one other value"
        )
        raise ScanFileError(path, "label_values", reason)
    return np.asarray(volume.voxels != BACKGROUND)


def _describe_grids(volume: Volume, first: Volume) -> str:
    texts = []
    for grid in (volume.grid, first.grid):
        shape = " x ".join(map(str, grid.shape))
        spacing = " x ".join(f"{mm:.3g}" for mm in grid.spacing_mm)
        texts.append(f"{shape} of {spacing} mm {grid.orientation}")
    return (
        f"its voxel grid ({texts[0]}) is not that of the other structures ({texts[1]}); export "
        "the structures of a case on one grid"
    )


def _report_overlaps(
    overlaps: Mapping[tuple[int, int], int], mapping: LabelMapping
) -> Iterable[Finding]:
    if not overlaps:
        return []
    names = mapping.scheme.class_names
    shown = []
    for (earlier, later), voxels in sorted(overlaps.items()):
        pair = f"{printable(names[earlier])} and {printable(names[later])}"
        shown.append(f"{pair} in {voxels:,} voxels, which count as {printable(names[later])}")
    message = f"structures overlap: {list_some(shown, MAX_PAIRS_SHOWN)}"
    return [Finding("warning", "structures_overlap", message)]
