"""Post-process a finished mask, structure by structure.

`STEPS` are applied in their order: keep the largest part of organs, fill holes, remove distant
lesions, trim lesions outside their organ, relabel small parts. `liverseg postprocess` chooses on
validation cases which of them help (see `postprocess_search`). Used by `segment_scan`,
`evaluate_cases` and `postprocess_search`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import cc3d
import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from liverseg_dist.config import InferenceConfig
from liverseg_dist.inference.structure_settings import (
    StructureSettings,
    resolve_structure_settings,
)
from liverseg_dist.inference.structure_values import (
    find_container,
    find_own_value,
    find_value_after_removal,
    list_tissue_values,
    select_values,
)
from liverseg_dist.labels import BACKGROUND, LITS_SCHEME, LabelScheme, Structure
from liverseg_dist.volume import Float3

ORGAN_CONNECTIVITY: Final = 26
LESION_CONNECTIVITY: Final = 6
"""Faces, as lesions are counted in LiTS."""
HOLE_CONNECTIVITY: Final = 6
"""A hole is closed if no path over faces leads out of it."""
ROUNDING_MM = 1e-9
"""Distances up to this much above a limit are within it."""
MM3_PER_ML = 1000


def postprocess_mask(
    mask_zyx: np.ndarray,
    spacing_mm: Float3,
    config: InferenceConfig,
    labels: LabelScheme = LITS_SCHEME,
) -> None:
    """Apply the steps that the settings switch on, in place.

    Args:
        mask_zyx: class values; an empty mask stays empty.
        spacing_mm: voxel size z, y, x.
        config: settings of `inference.*`.
        labels: the structures of the mask.

    Raises:
        UserError: a setting names a structure that the labels do not have.
    """
    settings = resolve_structure_settings(config, labels)
    # Most of a scan is background; all steps depend only on what is inside the box.
    box = find_foreground_box(mask_zyx)
    if box is None:
        return
    for apply_step in STEPS.values():
        apply_step(mask_zyx[box], spacing_mm, settings, labels)


def _apply_largest_component(
    mask_zyx: np.ndarray, spacing_mm: Float3, settings: StructureSettings, labels: LabelScheme
) -> None:
    for name in settings.largest_component:
        organ = labels.structure(name)
        near = []
        for lesion in labels.lesions:
            # Lesions far from the kept part are judged by distance below, instead of being removed
            # with their part.
            if lesion.inside == name and lesion.name in settings.reach_mm:
                near.append(lesion)
        if not keep_largest_component(mask_zyx, organ, labels, near):
            continue
        for lesion in near:
            remove_distant_lesions(
                mask_zyx, spacing_mm, settings.reach_mm[lesion.name], lesion, labels
            )


def _apply_fill_holes(
    mask_zyx: np.ndarray, spacing_mm: Float3, settings: StructureSettings, labels: LabelScheme
) -> None:
    for name in settings.fill_holes:
        fill_holes(mask_zyx, labels.structure(name), labels)


def _apply_reach(
    mask_zyx: np.ndarray, spacing_mm: Float3, settings: StructureSettings, labels: LabelScheme
) -> None:
    for name, reach_mm in settings.reach_mm.items():
        remove_distant_lesions(mask_zyx, spacing_mm, reach_mm, labels.structure(name), labels)


def _apply_cut(
    mask_zyx: np.ndarray, spacing_mm: Float3, settings: StructureSettings, labels: LabelScheme
) -> None:
    for name, reach_mm in settings.cut_mm.items():
        trim_lesions_outside_organ(mask_zyx, spacing_mm, reach_mm, labels.structure(name), labels)


def _apply_min_volume(
    mask_zyx: np.ndarray, spacing_mm: Float3, settings: StructureSettings, labels: LabelScheme
) -> None:
    voxel_volume_ml = math.prod(spacing_mm) / MM3_PER_ML
    for name, volume_ml in settings.min_volume_ml.items():
        # A volume of exactly n voxels must not be rounded up to n + 1.
        min_voxels = math.ceil(volume_ml / voxel_volume_ml - 1e-9)
        relabel_small_components(mask_zyx, min_voxels, labels.structure(name), labels)


Step = Callable[[np.ndarray, Float3, StructureSettings, LabelScheme], None]
STEPS: Mapping[str, Step] = {
    "largest_component": _apply_largest_component,
    "fill_holes": _apply_fill_holes,
    "reach_mm": _apply_reach,
    "cut_mm": _apply_cut,
    "min_volume_ml": _apply_min_volume,
}
"""By their key in `inference.*`, in the order of their application; each works in place."""


def keep_largest_component(
    mask_zyx: np.ndarray,
    organ: Structure,
    labels: LabelScheme,
    kept_lesions: Sequence[Structure] = (),
) -> bool:
    """Keep the largest connected part of an organ with its lesions, in place; of equals, the first.

    Args:
        mask_zyx: class values.
        organ: the structure; other structures do not change.
        labels: the structures of the mask.
        kept_lesions: lesions that stay where they are, also without contact to the kept part.

    Returns:
        Whether the organ had several parts.
    """
    components = cc3d.connected_components(
        select_values(mask_zyx, organ.values).view(np.uint8), connectivity=ORGAN_CONNECTIVITY
    )
    voxels = cc3d.statistics(components, no_slice_conversion=True)["voxel_counts"][1:]
    # One part is the usual case; the mask is left as it is, also its memory.
    if len(voxels) < 2:
        return False
    largest = np.argmax(voxels) + 1
    replacement = find_value_after_removal(labels, organ)
    kept_values: set[int] = set()
    for lesion in kept_lesions:
        kept_values |= set(lesion.values)
    # Slice by slice: temporary copies of a large scan would need much memory.
    for mask_yx, components_yx in zip(mask_zyx, components, strict=True):
        is_removed = (components_yx != largest) & (components_yx != 0)
        if kept_values:
            is_removed &= ~select_values(mask_yx, kept_values)
        mask_yx[is_removed] = replacement
    return True


def fill_holes(mask_zyx: np.ndarray, organ: Structure, labels: LabelScheme) -> None:
    """Fill background that an organ encloses, in place.

    A hole is background that is not connected with the array's edge and touches no other structure.
    It gets the value of the organ's tissue, or that of a lesion if nothing else touches it.
    """
    # With a margin, all background that is connected with the edge is one component.
    padded = np.pad(mask_zyx, 1)
    spaces = cc3d.connected_components(
        (padded == BACKGROUND).view(np.uint8), connectivity=HOLE_CONNECTIVITY
    )
    count = int(spaces.max()) + 1
    own_value = find_own_value(labels, organ)
    values = np.zeros(count, dtype=np.uint8)
    touching = np.zeros(count, dtype=np.int64)
    for value in organ.values:
        adjacent = _find_adjacent_components(spaces, padded == value)
        # Of an organ without a value of its own, the lowest value at the hole is used.
        several = own_value if own_value is not None else values[adjacent]
        values[adjacent] = np.where(touching[adjacent] > 0, several, value)
        touching[adjacent] += 1
    others = (padded != BACKGROUND) & ~select_values(padded, organ.values)
    if others.any():
        values[_find_adjacent_components(spaces, others)] = BACKGROUND
    values[[0, spaces[0, 0, 0]]] = BACKGROUND
    # The maximum writes the holes and keeps everything else: holes are 0 in the mask.
    np.maximum(mask_zyx, values[spaces[1:-1, 1:-1, 1:-1]], out=mask_zyx)


def remove_distant_lesions(
    mask_zyx: np.ndarray,
    spacing_mm: Float3,
    reach_mm: float,
    lesion: Structure,
    labels: LabelScheme,
) -> None:
    """Turn lesions far from any tissue of their organ into background, in place.

    A lesion is removed or kept as a whole, because it can grow out of the organ.

    Args:
        mask_zyx: class values.
        spacing_mm: voxel size z, y, x.
        reach_mm: maximum distance of a lesion's nearest voxel; at least one voxel.
        lesion: a structure inside another one.
        labels: the structures of the mask.
    """
    lesions = cc3d.connected_components(
        select_values(mask_zyx, lesion.values).view(np.uint8), connectivity=LESION_CONNECTIVITY
    )
    count = int(lesions.max())
    tissue = _select_tissue(mask_zyx, lesion, labels)
    # Lesions that touch tissue are kept without a search: most lesions do.
    detached = np.setdiff1d(np.arange(1, count + 1), _find_adjacent_components(lesions, tissue))
    if detached.size == 0:
        return
    is_removed = np.zeros(count + 1, dtype=bool)
    spacing = np.asarray(spacing_mm)
    # A tree over the tissue and not a distance map of the volume: detached lesions are few and
    # small.
    tree = cKDTree(np.argwhere(tissue) * spacing) if tissue.any() else None
    boxes = cc3d.statistics(lesions)["bounding_boxes"]
    for number in detached:
        box = boxes[number]
        corner = [axis.start for axis in box]
        voxels = np.argwhere(lesions[box] == number) + corner
        nearest = np.inf if tree is None else tree.query(voxels * spacing)[0].min()
        is_removed[number] = nearest > _compute_limit_mm(reach_mm, spacing)
    mask_zyx[is_removed[lesions]] = BACKGROUND


def trim_lesions_outside_organ(
    mask_zyx: np.ndarray,
    spacing_mm: Float3,
    reach_mm: float,
    lesion: Structure,
    labels: LabelScheme,
) -> None:
    """Turn lesion voxels far outside their organ into background, in place.

    Inside is tissue of the organ and everything that it encloses in a slice of any of the three
    planes. So a large lesion stays, although its centre is far from any tissue. A lesion at the
    organ's edge keeps the part inside the organ and up to `reach_mm` around it.

    Args:
        mask_zyx: class values.
        spacing_mm: voxel size z, y, x.
        reach_mm: maximum distance from the organ; at least one voxel.
        lesion: a structure inside another one.
        labels: the structures of the mask.
    """
    tissue = _select_tissue(mask_zyx, lesion, labels)
    inside = tissue.copy()
    # Slice by slice in each plane: a vessel that enters a lesion leaves no closed hole in 3D.
    for axis in range(3):
        inside_planes, tissue_planes = np.moveaxis(inside, axis, 0), np.moveaxis(tissue, axis, 0)
        for inside_plane, tissue_plane in zip(inside_planes, tissue_planes, strict=True):
            inside_plane |= ndimage.binary_fill_holes(tissue_plane)
    outside = np.argwhere(select_values(mask_zyx, lesion.values) & ~inside)
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


def relabel_small_components(
    mask_zyx: np.ndarray, min_voxels: int, structure: Structure, labels: LabelScheme
) -> None:
    """Turn connected parts of fewer voxels into what is around the structure, in place.

    A lesion becomes tissue of its organ and not background, because the network found organ or
    lesion there.
    """
    members = select_values(mask_zyx, structure.values).view(np.uint8)
    box = find_foreground_box(members)
    if box is None:
        return
    # cc3d needs contiguous memory; the copy has the size of the box only.
    inner = np.ascontiguousarray(members[box])
    is_lesion = structure.kind == "lesion"
    kept = cc3d.dust(
        inner,
        threshold=min_voxels,
        connectivity=LESION_CONNECTIVITY if is_lesion else ORGAN_CONNECTIVITY,
        binary_image=True,
    )
    mask_zyx[box][(inner != 0) & (kept == 0)] = find_value_after_removal(labels, structure)


def _select_tissue(mask_zyx: np.ndarray, lesion: Structure, labels: LabelScheme) -> np.ndarray:
    """Tissue of the structure around a lesion, without any lesion in it."""
    container = find_container(labels, lesion)
    assert container is not None
    return select_values(mask_zyx, list_tissue_values(labels, container))


def _compute_limit_mm(reach_mm: float, spacing: np.ndarray) -> float:
    """At least one voxel: the distance of direct neighbours must never count as far."""
    return max(reach_mm, float(spacing.max())) + ROUNDING_MM


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
