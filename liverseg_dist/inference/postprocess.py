"""Post-process a finished mask.

`STEPS` are applied in their order: keep the largest liver, fill holes, remove distant tumours, trim
tumours outside the liver, relabel small tumours. `liverseg postprocess` chooses on validation cases
which of them help (see `postprocess_search`). Used by `segment_scan`, `evaluate_cases` and
`postprocess_search`.
"""

import math
from collections.abc import Callable, Mapping
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
"""Faces, as lesions are counted in LiTS."""
HOLE_CONNECTIVITY: Final = 6
"""A hole is closed if no path over faces leads out of it."""
ROUNDING_MM = 1e-9
"""Distances up to this much above a limit are within it."""
MM3_PER_ML = 1000


def postprocess_mask(mask_zyx: np.ndarray, spacing_mm: Float3, config: InferenceConfig) -> None:
    """Apply the steps that the settings switch on, in place.

    Args:
        mask_zyx: labels; an empty mask stays empty.
        spacing_mm: voxel size z, y, x.
        config: settings of `inference.*`.
    """
    # Most of a scan is background; all steps depend only on what is inside the box.
    box = find_foreground_box(mask_zyx)
    if box is None:
        return
    for apply_step in STEPS.values():
        apply_step(mask_zyx[box], spacing_mm, config)


def _apply_largest_component(
    mask_zyx: np.ndarray, spacing_mm: Float3, config: InferenceConfig
) -> None:
    if config.largest_component:
        keep_largest_liver(mask_zyx, spacing_mm, config.tumour_reach_mm)


def _apply_fill_holes(mask_zyx: np.ndarray, spacing_mm: Float3, config: InferenceConfig) -> None:
    if config.fill_holes:
        fill_holes(mask_zyx)


def _apply_tumour_reach(mask_zyx: np.ndarray, spacing_mm: Float3, config: InferenceConfig) -> None:
    if config.tumour_reach_mm is not None:
        remove_distant_tumours(mask_zyx, spacing_mm, config.tumour_reach_mm)


def _apply_tumour_cut(mask_zyx: np.ndarray, spacing_mm: Float3, config: InferenceConfig) -> None:
    if config.tumour_cut_mm is not None:
        trim_tumours_outside_liver(mask_zyx, spacing_mm, config.tumour_cut_mm)


def _apply_min_tumour(mask_zyx: np.ndarray, spacing_mm: Float3, config: InferenceConfig) -> None:
    if config.min_tumour_ml > 0:
        voxel_volume_ml = math.prod(spacing_mm) / MM3_PER_ML
        # A volume of exactly n voxels must not be rounded up to n + 1.
        min_voxels = math.ceil(config.min_tumour_ml / voxel_volume_ml - 1e-9)
        relabel_small_tumours(mask_zyx, min_voxels)


STEPS: Mapping[str, Callable[[np.ndarray, Float3, InferenceConfig], None]] = {
    "largest_component": _apply_largest_component,
    "fill_holes": _apply_fill_holes,
    "tumour_reach_mm": _apply_tumour_reach,
    "tumour_cut_mm": _apply_tumour_cut,
    "min_tumour_ml": _apply_min_tumour,
}
"""By their key in `inference.*`, in the order of their application; each works in place."""


def keep_largest_liver(
    mask_zyx: np.ndarray, spacing_mm: Float3 = (1.0, 1.0, 1.0), tumour_reach_mm: float | None = None
) -> None:
    """Keep the largest connected liver with its tumours, in place; of equals, the first one.

    Args:
        mask_zyx: labels.
        spacing_mm: voxel size z, y, x; used with `tumour_reach_mm` only.
        tumour_reach_mm: tumours that are not connected with the kept liver stay up to this distance
            from it; None: they become background.
    """
    components = cc3d.connected_components(
        (mask_zyx > BACKGROUND).view(np.uint8), connectivity=LIVER_CONNECTIVITY
    )
    voxels = cc3d.statistics(components, no_slice_conversion=True)["voxel_counts"][1:]
    if len(voxels) < 2:
        return
    largest = np.argmax(voxels) + 1
    # Slice by slice: temporary copies of a large scan would need much memory.
    for mask_yx, components_yx in zip(mask_zyx, components, strict=True):
        is_removed = components_yx != largest
        if tumour_reach_mm is not None:
            is_removed &= mask_yx == LIVER
        mask_yx[is_removed] = BACKGROUND
    if tumour_reach_mm is not None:
        del components
        remove_distant_tumours(mask_zyx, spacing_mm, tumour_reach_mm)


def fill_holes(mask_zyx: np.ndarray) -> None:
    """Fill background that is not connected with the array's edge, in place.

    A hole becomes tumour if only tumour touches it, otherwise liver.
    """
    # With a margin, all background that is connected with the edge is one component.
    padded = np.pad(mask_zyx, 1)
    spaces = cc3d.connected_components(
        (padded == BACKGROUND).view(np.uint8), connectivity=HOLE_CONNECTIVITY
    )
    values = np.full(int(spaces.max()) + 1, TUMOUR, dtype=np.uint8)
    values[_find_adjacent_components(spaces, padded == LIVER)] = LIVER
    values[[0, spaces[0, 0, 0]]] = BACKGROUND
    np.maximum(mask_zyx, values[spaces[1:-1, 1:-1, 1:-1]], out=mask_zyx)


def remove_distant_tumours(mask_zyx: np.ndarray, spacing_mm: Float3, reach_mm: float) -> None:
    """Turn tumours far from any liver tissue into background, in place.

    A tumour is removed or kept as a whole, because it can grow out of the liver.

    Args:
        mask_zyx: labels.
        spacing_mm: voxel size z, y, x.
        reach_mm: maximum distance of a tumour's nearest voxel; at least one voxel.
    """
    tumours = cc3d.connected_components(
        (mask_zyx == TUMOUR).view(np.uint8), connectivity=TUMOUR_CONNECTIVITY
    )
    count = int(tumours.max())
    tissue = mask_zyx == LIVER
    detached = np.setdiff1d(np.arange(1, count + 1), _find_adjacent_components(tumours, tissue))
    if detached.size == 0:
        return
    is_removed = np.zeros(count + 1, dtype=bool)
    spacing = np.asarray(spacing_mm)
    tree = cKDTree(np.argwhere(tissue) * spacing) if tissue.any() else None
    boxes = cc3d.statistics(tumours)["bounding_boxes"]
    for number in detached:
        box = boxes[number]
        corner = [axis.start for axis in box]
        voxels = np.argwhere(tumours[box] == number) + corner
        nearest = np.inf if tree is None else tree.query(voxels * spacing)[0].min()
        is_removed[number] = nearest > _compute_limit_mm(reach_mm, spacing)
    mask_zyx[is_removed[tumours]] = BACKGROUND


def trim_tumours_outside_liver(mask_zyx: np.ndarray, spacing_mm: Float3, reach_mm: float) -> None:
    """Turn tumour voxels far outside the liver into background, in place.

    Inside is liver tissue and everything that it encloses in a slice of any of the three planes. So
    a large tumour stays, although its centre is far from any tissue. A tumour at the liver's edge
    keeps the part inside the liver and up to `reach_mm` around it.

    Args:
        mask_zyx: labels.
        spacing_mm: voxel size z, y, x.
        reach_mm: maximum distance from the liver; at least one voxel.
    """
    tissue = mask_zyx == LIVER
    inside = tissue.copy()
    for axis in range(3):
        inside_planes, tissue_planes = np.moveaxis(inside, axis, 0), np.moveaxis(tissue, axis, 0)
        for inside_plane, tissue_plane in zip(inside_planes, tissue_planes, strict=True):
            inside_plane |= ndimage.binary_fill_holes(tissue_plane)
    outside = np.argwhere((mask_zyx == TUMOUR) & ~inside)
    if not len(outside):
        return
    spacing = np.asarray(spacing_mm)
    # The nearest voxel of a mask is one of its edge, and the edge has far fewer voxels.
    edge = np.argwhere(inside & ~ndimage.binary_erosion(inside))
    distance_mm = np.full(len(outside), np.inf)
    if len(edge):
        distance_mm = cKDTree(edge * spacing).query(outside * spacing)[0]
    removed = outside[distance_mm > _compute_limit_mm(reach_mm, spacing)]
    mask_zyx[tuple(removed.T)] = BACKGROUND


def _compute_limit_mm(reach_mm: float, spacing: np.ndarray) -> float:
    """At least one voxel: the distance of direct neighbours must never count as far."""
    return max(reach_mm, float(spacing.max())) + ROUNDING_MM


def relabel_small_tumours(mask_zyx: np.ndarray, min_voxels: int) -> None:
    """Turn tumours of fewer voxels into liver, in place.

    They become liver and not background, because the network found liver or tumour there.
    """
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
    """The smallest box with every voxel above 0; None if there are none.

    It reads the mask once and copies no part of it.
    """
    in_plane = np.zeros(mask_zyx.shape[1:], dtype=bool)
    slices = []
    for z, slice_yx in enumerate(mask_zyx):
        is_foreground = slice_yx > 0
        if is_foreground.any():
            slices.append(z)
            in_plane |= is_foreground
    if not slices:
        return None
    rows = np.flatnonzero(in_plane.any(axis=1))
    columns = np.flatnonzero(in_plane.any(axis=0))
    return (
        slice(slices[0], slices[-1] + 1),
        slice(int(rows[0]), int(rows[-1]) + 1),
        slice(int(columns[0]), int(columns[-1]) + 1),
    )


def _find_adjacent_components(labels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Numbers above 0 of the components that share a face with a voxel of `mask`."""
    found = []
    for axis in range(3):
        labels_along, mask_along = np.moveaxis(labels, axis, 0), np.moveaxis(mask, axis, 0)
        # Shifted by one voxel against each other: every pair of neighbours along the axis.
        found.append(np.unique(labels_along[1:][mask_along[:-1]]))
        found.append(np.unique(labels_along[:-1][mask_along[1:]]))
    numbers = np.unique(np.concatenate(found))
    return numbers[numbers > 0]
