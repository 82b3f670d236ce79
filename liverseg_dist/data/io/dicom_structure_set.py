"""Read the contours of a DICOM structure set (RTSTRUCT) onto the grid of a scan.

A voxel belongs to a structure if its centre is inside an odd number of the contours of its slice, so
that inner contours cut holes. Contours must lie on the slices of the scan; a set of another series
is refused.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from liverseg_dist.data.findings import ScanFileError
from liverseg_dist.data.io.dicom_geometry import LPS_TO_RAS
from liverseg_dist.texts.names import clean_text
from liverseg_dist.volume import Grid, Volume

STRUCTURE_SET_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
NAME = "RTSTRUCT"
CLOSED = "CLOSED_PLANAR"
SLICE_TOLERANCE = 0.25
"""Largest distance of a contour from the centre of its slice, in slices."""
MAX_NAME_CHARACTERS = 100


def list_roi_names(dataset: Any) -> list[tuple[int, str]]:
    """Number and name of each structure."""
    names = []
    for item in dataset.get("StructureSetROISequence") or ():
        number = int(item.get("ROINumber", 0))
        name = clean_text(str(item.get("ROIName", "")))[:MAX_NAME_CHARACTERS]
        names.append((number, name or f"structure{number}"))
    return names


def fill_structure(dataset: Any, numbers: set[int], grid: Grid) -> Volume:
    """The structures of these numbers as a mask (uint8, 0 and 1) on the grid of the scan.

    Raises:
        ScanFileError: a contour is not on a slice of the scan.
    """
    mask = np.zeros(grid.shape, dtype=np.uint8)
    parity = np.zeros(grid.shape, dtype=bool)
    for points_lps in _list_contours(dataset, numbers):
        index = grid.index_of(points_lps @ LPS_TO_RAS.T)
        at = round(float(index[:, 0].mean()))
        is_on_slice = np.abs(index[:, 0] - at).max() <= SLICE_TOLERANCE
        if not is_on_slice or not 0 <= at < grid.shape[0]:
            reason = "its contours are not on the slices of the scan: it belongs to another series"
            raise ScanFileError(NAME, "dicom_seg_grid", reason)
        parity[at] ^= fill_polygon(index[:, 1], index[:, 2], grid.shape[1:])
    mask[parity] = 1
    return Volume(mask, grid)


def _list_contours(dataset: Any, numbers: set[int]) -> Iterator[np.ndarray]:
    """Points (n, 3) in LPS of the closed contours."""
    for item in dataset.get("ROIContourSequence") or ():
        if int(item.get("ReferencedROINumber", 0)) not in numbers:
            continue
        for contour in item.get("ContourSequence") or ():
            if str(contour.get("ContourGeometricType", CLOSED)) != CLOSED:
                continue
            values = np.array([float(one) for one in contour.ContourData])
            if values.size >= 9 and values.size % 3 == 0 and np.isfinite(values).all():
                yield values.reshape(-1, 3)


def fill_polygon(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Pixels (row, column) whose centres are inside a polygon, by the even-odd rule.

    Args:
        rows, columns: corners in pixels; whole numbers are centres.
        shape: of the result.
    """
    inside = np.zeros(shape, dtype=bool)
    next_rows, next_columns = np.roll(rows, -1), np.roll(columns, -1)
    first = max(0, int(np.ceil(rows.min())))
    last = min(shape[0] - 1, int(np.floor(rows.max())))
    places = np.arange(shape[1])
    for row in range(first, last + 1):
        # Half-open: a corner on the line counts for one of its two edges.
        crosses = (rows <= row) != (next_rows <= row)
        if not crosses.any():
            continue
        share = (row - rows[crosses]) / (next_rows[crosses] - rows[crosses])
        at = columns[crosses] + share * (next_columns[crosses] - columns[crosses])
        inside[row] = (np.searchsorted(np.sort(at), places, side="right") % 2).astype(bool)
    return inside
