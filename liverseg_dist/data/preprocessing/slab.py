"""The position and the padding of the 64-slice slabs that hold the liver.

`place_slabs` chooses the position by the policy `convert.slab.policy` (SLAB_POLICIES). What they
lose of a scan is measured in `slab_coverage`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from liverseg_dist.config import SlabConfig
from liverseg_dist.errors import UserError
from liverseg_dist.labels import IGNORE, LARGEST_VALUE, LITS_SCHEME, LabelScheme
from liverseg_dist.volume import Float3, Grid, Volume

TILE_STEP = 48
"""Slices between the starts of neighbouring tiles: a quarter of each tile overlaps."""


@dataclass(frozen=True)
class Slab:
    """A grid of exactly 64 slices, and the range of slices that are within the scan."""

    grid: Grid
    valid_slices: tuple[int, int]


@dataclass(frozen=True)
class LabelExtent:
    """The position of the structures along z, in slices of the grid `base`."""

    base: Grid
    counts: np.ndarray
    """(slices, 2): voxels of organs without their lesions, and of lesions, in each slice."""
    low: float
    high: float
    """The structures are in the slices [low, high); the whole scan for an empty label."""


SlabPolicy = Callable[[LabelExtent, SlabConfig], tuple[Slab, ...]]


def place_slabs(
    scan: Grid,
    label: Volume | None,
    spacing_mm: Float3 | None,
    config: SlabConfig,
    labels: LabelScheme = LITS_SCHEME,
) -> tuple[Slab, ...]:
    """Choose the position of a scan's slabs.

    Args:
        scan: Grid of the scan, RAS.
        label: RAS, any spacing, same field of view. None: the position of the structures is unknown,
            and the whole scan is covered by tiles for any policy.
        spacing_mm: Voxel size (z, y, x) of the slabs; None keeps that of the scan.
        config: Settings of the slabs.
        labels: Scheme of the label.

    Returns:
        The slabs from inferior to superior: one for `fit` and `window`, one or more for `tile`.

    Raises:
        UserError: The policy, or a structure of `config.around`, is unknown.
    """
    if config.policy not in SLAB_POLICIES:
        raise UserError(
            f"convert.slab.policy: unknown policy {config.policy!r}; "
            f"use one of {', '.join(SLAB_POLICIES)}"
        )
    base = scan if spacing_mm is None else scan.with_spacing(spacing_mm)
    counts = _count_in_slices(base, label, labels, config.around)
    if config.around is not None and not counts.any():
        # A case without these structures: the slab is placed around all that it has.
        counts = _count_in_slices(base, label, labels, None)
    occupied = np.flatnonzero(counts.sum(axis=1))
    low, high = 0.0, float(base.shape[0])
    if occupied.size:
        low, high = float(occupied[0]), float(occupied[-1] + 1)
    # Without a label no policy can find the structures, so tiles cover the whole scan.
    place = SLAB_POLICIES[config.policy] if label is not None else _place_tiles
    return place(LabelExtent(base, counts, low, high), config)


def _place_fitted(extent: LabelExtent, config: SlabConfig) -> tuple[Slab, ...]:
    """All structures plus margin in one slab, with thicker slices if 64 are too few."""
    base = extent.base
    length = base.shape[0]
    margin = config.margin_mm / base.spacing_mm[0]
    low, high = max(0.0, extent.low - margin), min(float(length), extent.high + margin)
    if high - low > config.slices:
        return (_stretch_slab(base, low, high, config.slices),)
    start = _centred_start(low, high, length, config.slices)
    return (_cut_slab(base, start, config.slices),)


def _place_window(extent: LabelExtent, config: SlabConfig) -> tuple[Slab, ...]:
    """The 64 contiguous slices with most lesion voxels, then most organ voxels."""
    start = _fullest_start(extent.counts, config.slices)
    return (_cut_slab(extent.base, start, config.slices),)


def _place_tiles(extent: LabelExtent, config: SlabConfig) -> tuple[Slab, ...]:
    """Overlapping slabs that cover all structures."""
    starts = _tile_starts(extent.low, extent.high, extent.base.shape[0], config.slices)
    return tuple(_cut_slab(extent.base, start, config.slices) for start in starts)


SLAB_POLICIES: dict[str, SlabPolicy] = {
    "fit": _place_fitted,
    "window": _place_window,
    "tile": _place_tiles,
}
"""Policy by its name in `convert.slab.policy`."""


def mark_padding(label_zyx: np.ndarray, slab: Slab) -> np.ndarray:
    """A copy of the label in which the slab's padding has the value IGNORE."""
    marked = label_zyx.copy()
    marked[: slab.valid_slices[0]] = IGNORE
    marked[slab.valid_slices[1] :] = IGNORE
    return marked


def count_per_slice(label_zyx: np.ndarray) -> np.ndarray:
    """Voxels of each class value in each slice: (slices, LARGEST_VALUE + 1)."""
    counts = [np.bincount(slice_yx.ravel(), minlength=LARGEST_VALUE + 1) for slice_yx in label_zyx]
    return np.array(counts).reshape(-1, LARGEST_VALUE + 1)


def _count_in_slices(
    base: Grid, label: Volume | None, labels: LabelScheme, around: tuple[str, ...] | None
) -> np.ndarray:
    """(slices of base, 2): voxels of organs and of lesions of the label in each slice.

    A voxel of both counts as one of the lesion.
    """
    counts = np.zeros((base.shape[0], 2))
    if label is None:
        counts[:, 0] = 1
        return counts
    z = np.arange(label.shape[0], dtype=float)
    centres = label.grid.world_mm(np.stack([z, np.zeros_like(z), np.zeros_like(z)], axis=1))
    slices = np.round(base.index_of(centres)[:, 0])
    slices = np.clip(slices, 0, base.shape[0] - 1).astype(int)
    names = labels.structure_names if around is None else around
    is_lesion = np.zeros(LARGEST_VALUE + 1, dtype=bool)
    is_wanted = np.zeros(LARGEST_VALUE + 1, dtype=bool)
    for name in names:
        structure = labels.structure(name)
        is_wanted[list(structure.values)] = True
    for lesion in labels.lesions:
        is_lesion[list(lesion.values)] = True
    by_value = count_per_slice(label.voxels)
    organ_counts = by_value[:, is_wanted & ~is_lesion].sum(axis=1)
    lesion_counts = by_value[:, is_wanted & is_lesion].sum(axis=1)
    for column, per_slice in enumerate((organ_counts, lesion_counts)):
        # Several slices of the label can be in one slice of the base: `+=` would lose counts.
        np.add.at(counts[:, column], slices, per_slice)
    return counts


def _cut_slab(base: Grid, start: int, slices: int) -> Slab:
    """Slices [start, start + slices) of the base grid; those outside of it are padding."""
    grid = base.cropped((start, 0, 0), (slices, *base.shape[1:]))
    return Slab(grid, (max(0, -start), min(slices, base.shape[0] - start)))


def _stretch_slab(base: Grid, low: float, high: float, slices: int) -> Slab:
    """A slab whose outer faces are at `low` and `high`, in slices of `base` from its lower face."""
    step = (high - low) / slices
    affine = base.affine.copy()
    affine[:3, 2] = base.affine[:3, 2] * step
    # The centre of voxel 0 of the base is half a slice above its lower face.
    affine[:3, 3] = base.world_mm(np.array([low + step / 2 - 0.5, 0, 0]))
    return Slab(Grid((slices, *base.shape[1:]), affine), (0, slices))


def _centred_start(low: float, high: float, length: int, slices: int) -> int:
    """Start of the slab centred on [low, high), shifted into the scan.

    A scan shorter than the slab is centred in it: the start is negative.
    """
    if length <= slices:
        return -((slices - length) // 2)
    return int(np.clip(round((low + high - slices) / 2), 0, length - slices))


def _fullest_start(counts: np.ndarray, slices: int) -> int:
    """Start of the first window with most lesion voxels, then most organ voxels."""
    if len(counts) <= slices:
        return _centred_start(0, len(counts), len(counts), slices)
    sums = np.cumsum(np.vstack([np.zeros(2), counts]), axis=0)
    windows = sums[slices:] - sums[:-slices]
    # lexsort orders by its last key first: lesions, then organs, then position.
    order = np.lexsort((np.arange(len(windows)), -windows[:, 0], -windows[:, 1]))
    return int(order[0])


def _tile_starts(low: float, high: float, length: int, slices: int) -> list[int]:
    """Starts of overlapping tiles that cover [low, high)."""
    if length <= slices or high - low <= slices:
        return [_centred_start(low, high, length, slices)]
    # The last tile ends with the structures, so it may overlap its neighbour by more than a quarter.
    last = int(min(np.ceil(high), length)) - slices
    starts = list(range(max(0, int(low)), last, TILE_STEP))
    return [*starts, last]
