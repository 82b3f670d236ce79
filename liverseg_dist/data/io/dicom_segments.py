"""Read the segments of a DICOM segmentation (SEG, RTSTRUCT) onto the grid of a scan.

BINARY, FRACTIONAL (a voxel belongs to a segment from one half) and LABELMAP. Frames are placed by
their positions and must lie on the slices of the scan; a SEG of another series is refused.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from liverseg_dist.data.findings import ScanFileError
from liverseg_dist.data.io.dicom_files import DicomFile
from liverseg_dist.data.io.dicom_geometry import LPS_TO_RAS
from liverseg_dist.data.io.dicom_structure_set import (
    STRUCTURE_SET_CLASS,
    fill_structure,
    list_roi_names,
)
from liverseg_dist.optional_packages import load_module, quiet_pydicom
from liverseg_dist.texts.names import clean_text
from liverseg_dist.volume import Grid, Volume

SEG_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
"""Segmentation and Label Map Segmentation."""
NAME = "DICOM SEG"
INDEX_TOLERANCE = 0.1
"""Largest distance of a frame's corners from voxel centres, in voxels."""
MAX_NAME_CHARACTERS = 100
_NUMBERED = re.compile(r"(.*\S)[ _-]+\d+")


@dataclass(frozen=True)
class SegmentName:
    """One segment: its number, and its structure (lesions `tumour 1`, `tumour 2` are `tumour`)."""

    number: int
    structure: str


def is_segmentation(file: DicomFile) -> bool:
    """Whether a DICOM file is a SEG or an RTSTRUCT."""
    try:
        dataset = _read(file.path, only_header=True)
    except ScanFileError:
        return False
    return str(dataset.get("SOPClassUID", "")) in (*SEG_CLASSES, STRUCTURE_SET_CLASS)


def list_segment_names(path: Path) -> list[SegmentName]:
    """The segments of a SEG, without the background of a label map.

    A number at the end of a label is dropped if it is 1 or several segments share the text before it.

    Raises:
        ScanFileError: the file is damaged or has no segment.
    """
    dataset = _read(path, only_header=True)
    labels: list[tuple[int, str]] = list_roi_names(dataset)
    for item in dataset.get("SegmentSequence") or ():
        number = int(item.get("SegmentNumber", 0))
        if number:
            text = clean_text(str(item.get("SegmentLabel", "")))[:MAX_NAME_CHARACTERS]
            labels.append((number, text or f"segment{number}"))
    if not labels:
        raise ScanFileError(NAME, "dicom_seg", "has no segment")
    stems = []
    for _, label in labels:
        match = _NUMBERED.fullmatch(label)
        stems.append(match[1] if match else label)
    names = []
    for (number, label), stem in zip(labels, stems, strict=True):
        # A case with one lesion has `tumour 1` alone.
        is_numbered = stems.count(stem) > 1 or label[len(stem) :].strip(" _-") == "1"
        names.append(SegmentName(number, stem if is_numbered else label))
    return names


def read_segments(path: Path, structure: str, grid: Grid) -> Volume:
    """All segments of one structure as a mask (uint8, 0 and 1) on the grid of the scan.

    Raises:
        ScanFileError: the file is damaged, or its frames are not on the slices of the scan.
    """
    numbers = {one.number for one in list_segment_names(path) if one.structure == structure}
    dataset = _read(path)
    if str(dataset.get("SOPClassUID", "")) == STRUCTURE_SET_CLASS:
        try:
            return fill_structure(dataset, numbers, grid)
        except ScanFileError:
            raise
        except (Exception, RecursionError):
            raise ScanFileError(NAME, "dicom_seg", "is damaged; export it again") from None
    mask = np.zeros(grid.shape, dtype=np.uint8)
    try:
        kind = str(dataset.get("SegmentationType", "BINARY"))
        half = int(dataset.get("MaximumFractionalValue", 1)) / 2 if kind == "FRACTIONAL" else 0
        with quiet_pydicom():
            pixels = np.atleast_3d(dataset.pixel_array)
            if pixels.shape[-2:] != grid.shape[1:]:
                pixels = dataset.pixel_array[np.newaxis]
            for group, values in zip(_list_frames(dataset), pixels, strict=True):
                is_member = values > half if kind != "LABELMAP" else np.isin(values, list(numbers))
                if kind != "LABELMAP" and _segment_number(group, dataset) not in numbers:
                    continue
                at = _find_slice(group, dataset, grid)
                mask[at] |= is_member.astype(np.uint8)
    except ScanFileError:
        raise
    # pydicom raises many types for damaged files.
    except (Exception, RecursionError):
        raise ScanFileError(NAME, "dicom_seg", "is damaged; export it again") from None
    return Volume(mask, grid)


def _read(path: Path, only_header: bool = False) -> Any:
    pydicom = load_module("pydicom")
    try:
        with quiet_pydicom():
            return pydicom.dcmread(path, stop_before_pixels=only_header)
    except OSError as error:
        raise ScanFileError(NAME, "unreadable", error.strerror or "not readable") from None
    except (Exception, RecursionError):
        raise ScanFileError(NAME, "dicom_seg", "is damaged; export it again") from None


def _list_frames(dataset: Any) -> Iterator[Any]:
    yield from dataset.PerFrameFunctionalGroupsSequence


def _segment_number(group: Any, dataset: Any) -> int:
    # A SEG of one segment may state its number once for all frames.
    macro = _find_macro(group, dataset, "SegmentIdentificationSequence")
    return int(macro.ReferencedSegmentNumber)


def _find_macro(group: Any, dataset: Any, keyword: str) -> Any:
    if keyword in group:
        return group[keyword].value[0]
    return dataset.SharedFunctionalGroupsSequence[0][keyword].value[0]


def _find_slice(group: Any, dataset: Any, grid: Grid) -> int:
    """The slice of the grid that a frame lies on."""
    position = _floats(_find_macro(group, dataset, "PlanePositionSequence").ImagePositionPatient)
    plane = _find_macro(group, dataset, "PlaneOrientationSequence")
    directions = _floats(plane.ImageOrientationPatient)
    between_rows, between_columns = _floats(
        _find_macro(group, dataset, "PixelMeasuresSequence").PixelSpacing
    )
    rows, columns = grid.shape[1:]
    across = directions[:3] * between_columns * (columns - 1)
    down = directions[3:] * between_rows * (rows - 1)
    corners = np.array([position, position + across, position + down])
    index = grid.index_of(corners @ LPS_TO_RAS.T)
    at = round(float(index[0, 0]))
    expected = np.array([[at, 0, 0], [at, 0, columns - 1], [at, rows - 1, 0]])
    if not 0 <= at < grid.shape[0] or np.abs(index - expected).max() > INDEX_TOLERANCE:
        reason = "its frames are not on the slices of the scan: it belongs to another series"
        raise ScanFileError(NAME, "dicom_seg_grid", reason)
    return at


def _floats(values: Sequence[Any]) -> np.ndarray:
    return np.array([float(one) for one in values])
