"""What is done to a finished mask: largest liver, holes filled, stray tumours dropped, those that stick out cut, tiny
ones dropped; in that order.

Which of it helps is chosen on validation cases by `liverseg postprocess` (see `tuning`), not by hand.
"""

import math
from typing import Final

import cc3d
import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from liverseg_dist.config import InferenceConfig
from liverseg_dist.labels import BACKGROUND, LIVER, TUMOUR
from liverseg_dist.volume import Float3

LIVER_CONNECTIVITY: Final = 26
TUMOUR_CONNECTIVITY: Final = 6
"""Faces, as the lesions of LiTS are counted."""
HOLE_CONNECTIVITY: Final = 6
"""A hole is closed when no face leads out of it."""


def postprocess_mask(mask_zyx: np.ndarray, spacing_mm: Float3, config: InferenceConfig) -> None:
    """Apply what `config` asks for, in place; spacing is z, y, x. Works in the box that the foreground fills."""
    box = find_foreground_box(mask_zyx)
    if box is None:
        return
    inner = mask_zyx[box]
    if config.largest_component:
        keep_largest_liver(inner, spacing_mm, config.tumour_reach_mm)
    if config.fill_holes:
        fill_holes(inner)
    if config.tumour_reach_mm is not None:
        remove_distant_tumours(inner, spacing_mm, config.tumour_reach_mm)
    if config.tumour_cut_mm is not None:
        trim_tumours_outside_liver(inner, spacing_mm, config.tumour_cut_mm)
    if config.min_tumour_ml > 0:
        voxel_volume_ml = math.prod(spacing_mm) / 1000
        relabel_small_tumours(inner, math.ceil(config.min_tumour_ml / voxel_volume_ml - 1e-9))


def keep_largest_liver(
    mask_zyx: np.ndarray, spacing_mm: Float3 = (1.0, 1.0, 1.0), tumour_reach_mm: float | None = None
) -> None:
    """Keep the largest connected liver with its tumours, in place; of equals, the one met first.

    With a reach, tumours that lie apart from it but at most that far stay as well.
    """
    components = cc3d.connected_components(
        (mask_zyx > BACKGROUND).view(np.uint8), connectivity=LIVER_CONNECTIVITY
    )
    voxels = cc3d.statistics(components, no_slice_conversion=True)["voxel_counts"][1:]
    if len(voxels) < 2:
        return
    largest = np.argmax(voxels) + 1
    for mask_yx, components_yx in zip(
        mask_zyx, components, strict=True
    ):  # slice by slice: in large scans copies count
        stray = components_yx != largest
        mask_yx[stray if tumour_reach_mm is None else stray & (mask_yx == LIVER)] = BACKGROUND
    if tumour_reach_mm is not None:
        del components
        remove_distant_tumours(mask_zyx, spacing_mm, tumour_reach_mm)


def fill_holes(mask_zyx: np.ndarray) -> None:
    """Fill background that does not reach the array's edge, in place: as tumour where only tumour touches it."""
    around = np.pad(mask_zyx, 1)  # so that all that reaches the edge is one component
    spaces = cc3d.connected_components(
        (around == BACKGROUND).view(np.uint8), connectivity=HOLE_CONNECTIVITY
    )
    values = np.full(int(spaces.max()) + 1, TUMOUR, dtype=np.uint8)
    values[_find_adjacent_components(spaces, around == LIVER)] = LIVER
    values[[0, spaces[0, 0, 0]]] = BACKGROUND
    np.maximum(mask_zyx, values[spaces[1:-1, 1:-1, 1:-1]], out=mask_zyx)


def remove_distant_tumours(mask_zyx: np.ndarray, spacing_mm: Float3, reach_mm: float) -> None:
    """Turn tumours whose nearest voxel is more than `reach_mm` (or a voxel, if that is more) from any liver tissue
    into background, in place. A tumour is dropped or kept as a whole: it may grow out of the liver."""
    tumours = cc3d.connected_components(
        (mask_zyx == TUMOUR).view(np.uint8), connectivity=TUMOUR_CONNECTIVITY
    )
    count = int(tumours.max())
    tissue = mask_zyx == LIVER
    apart = np.setdiff1d(np.arange(1, count + 1), _find_adjacent_components(tumours, tissue))
    if apart.size == 0:
        return
    dropped = np.zeros(count + 1, dtype=bool)
    spacing = np.asarray(spacing_mm)
    tree = cKDTree(np.argwhere(tissue) * spacing) if tissue.any() else None
    boxes = cc3d.statistics(tumours)["bounding_boxes"]
    for number in apart:
        box = boxes[number]
        places = np.argwhere(tumours[box] == number) + [axis.start for axis in box]
        nearest = np.inf if tree is None else tree.query(places * spacing)[0].min()
        dropped[number] = nearest > max(reach_mm, spacing.max()) + 1e-9
    mask_zyx[dropped[tumours]] = BACKGROUND


def trim_tumours_outside_liver(mask_zyx: np.ndarray, spacing_mm: Float3, reach_mm: float) -> None:
    """Turn tumour voxels more than `reach_mm` (or a voxel, if that is more) outside the liver into background, in
    place. Inside is liver tissue and whatever it encloses in a slice of any of the three planes: so a large tumour,
    whose middle is far from any tissue, stays, and one at the edge keeps what lies in the liver and `reach_mm` around.
    """
    tissue = mask_zyx == LIVER
    inside = tissue.copy()
    for axis in range(3):
        for filled, plane in zip(
            np.moveaxis(inside, axis, 0), np.moveaxis(tissue, axis, 0), strict=True
        ):
            filled |= ndimage.binary_fill_holes(plane)
    outside = np.argwhere((mask_zyx == TUMOUR) & ~inside)
    if not len(outside):
        return
    spacing = np.asarray(spacing_mm)
    edge = np.argwhere(
        inside & ~ndimage.binary_erosion(inside)
    )  # the nearest voxel of a mask is one of its edge
    distance_mm = (
        cKDTree(edge * spacing).query(outside * spacing)[0]
        if len(edge)
        else np.full(len(outside), np.inf)
    )
    mask_zyx[tuple(outside[distance_mm > max(reach_mm, spacing.max()) + 1e-9].T)] = BACKGROUND


def relabel_small_tumours(mask_zyx: np.ndarray, min_voxels: int) -> None:
    """Turn tumours of fewer voxels into liver, in place: the network held the place for liver or tumour."""
    tumour = (mask_zyx == TUMOUR).view(np.uint8)
    box = find_foreground_box(tumour)
    if box is None:
        return
    inner = np.ascontiguousarray(tumour[box])
    kept = cc3d.dust(
        inner, threshold=min_voxels, connectivity=TUMOUR_CONNECTIVITY, binary_image=True
    )
    mask_zyx[box][(inner != 0) & (kept == 0)] = LIVER


def find_foreground_box(mask_zyx: np.ndarray) -> tuple[slice, slice, slice] | None:
    """The smallest box that holds every voxel above 0; None of nothing. One pass, no copy of the mask."""
    in_plane = np.zeros(mask_zyx.shape[1:], dtype=bool)
    slices = []
    for z, slice_yx in enumerate(mask_zyx):
        lit = slice_yx > 0
        if lit.any():
            slices.append(z)
            in_plane |= lit
    if not slices:
        return None
    rows, columns = (np.flatnonzero(in_plane.any(axis=axis)) for axis in (1, 0))
    return (
        slice(slices[0], slices[-1] + 1),
        slice(int(rows[0]), int(rows[-1]) + 1),
        slice(int(columns[0]), int(columns[-1]) + 1),
    )


def _find_adjacent_components(labels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Numbers above 0 of the components that share a face with a voxel of `mask`."""
    found = []
    for axis in range(3):
        ahead, behind = (
            tuple(slice(*ends) if a == axis else slice(None) for a in range(3)) for ends in _SHIFTS
        )
        found += [labels[ahead][mask[behind]], labels[behind][mask[ahead]]]
    numbers = np.unique(np.concatenate([np.unique(part) for part in found]))
    return numbers[numbers > 0]


_SHIFTS = ((1, None), (None, -1))
