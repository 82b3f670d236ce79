"""The 64 contiguous slices that hold the liver: where they lie, what is padding, and what the choice loses."""

from collections.abc import Sequence
from dataclasses import dataclass

import cc3d
import numpy as np

from liverseg_dist.config import SlabConfig
from liverseg_dist.labels import IGNORE, LIVER, TUMOUR
from liverseg_dist.volume import Float3, Grid, Volume

TILE_STEP = 48
"""Slices between the starts of neighbouring tiles: a quarter overlaps."""


@dataclass(frozen=True)
class Slab:
    """A grid of exactly 64 slices, and the range of them that lies within the scan."""

    grid: Grid
    valid_slices: tuple[int, int]


def place_slabs(scan: Grid, label: Volume | None, spacing_mm: Float3 | None, config: SlabConfig) -> tuple[Slab, ...]:
    """Slabs for a RAS scan. `label` (RAS, any spacing, same field of view) None: the whole scan counts as liver.

    One slab for `fit` and `window`, one or more for `tile`. `spacing_mm` None keeps the scan's own voxels.
    """
    base = scan if spacing_mm is None else scan.with_spacing(spacing_mm)
    counts = _slice_counts(base, label)
    used = np.flatnonzero(counts.sum(axis=1))
    low, high = (float(used[0]), float(used[-1] + 1)) if used.size else (0.0, float(base.shape[0]))
    slices = config.slices
    if config.policy == "fit":
        margin = config.margin_mm / base.spacing_mm[0]
        low, high = max(0.0, low - margin), min(float(base.shape[0]), high + margin)
        if high - low > slices:
            return (_stretched(base, low, high, slices),)
        return (_native(base, _centred(low, high, base.shape[0], slices), slices),)
    if config.policy == "window":
        return (_native(base, _fullest(counts, slices), slices),)
    return tuple(_native(base, start, slices) for start in _tiles(low, high, base.shape[0], slices))


def padded_label(label_zyx: np.ndarray, slab: Slab) -> np.ndarray:
    """The label with the slab's padding marked as no class at all."""
    padded = label_zyx.copy()
    padded[: slab.valid_slices[0]] = IGNORE
    padded[slab.valid_slices[1] :] = IGNORE
    return padded


def coverage(label: Volume, slabs: Sequence[Slab]) -> dict[str, float | int]:
    """Share of liver and of tumour voxels whose slice lies in a slab, and how many tumours are cut or missed."""
    inside = np.zeros(label.shape[0], dtype=bool)
    for slab in slabs:
        ends = slab.grid.world_mm(np.array([[-0.5, 0, 0], [slab.grid.shape[0] - 0.5, 0, 0]]))
        first, last = sorted(label.grid.index_of(ends)[:, 0])
        inside |= (np.arange(label.shape[0]) >= first - 1e-6) & (np.arange(label.shape[0]) <= last + 1e-6)
    found: dict[str, float | int] = {}
    for name, mask in (("liver", (label.voxels == LIVER) | (label.voxels == TUMOUR)), ("tumour", label.voxels == TUMOUR)):
        per_slice = mask.sum(axis=(1, 2), dtype=np.int64)
        found[f"{name}_inside"] = float(per_slice[inside].sum() / per_slice.sum()) if per_slice.any() else 1.0
    components, number = cc3d.connected_components(
        np.ascontiguousarray(label.voxels == TUMOUR), connectivity=26, return_N=True
    )
    cut = missed = 0
    if number and not inside.all():
        boxes = cc3d.statistics(components)["bounding_boxes"][1:]
        shares = [inside[box[0]] for box in boxes]
        missed = sum(not share.any() for share in shares)
        cut = sum(share.any() and not share.all() for share in shares)
    return {**found, "tumours_cut": int(cut), "tumours_missed": int(missed)}


def _slice_counts(base: Grid, label: Volume | None) -> np.ndarray:
    """(slices of base, 2): liver and tumour voxels of the label that fall into each slice."""
    counts = np.zeros((base.shape[0], 2))
    if label is None:
        counts[:, 0] = 1
        return counts
    z = np.arange(label.shape[0], dtype=float)
    centres = label.grid.world_mm(np.stack([z, np.zeros_like(z), np.zeros_like(z)], axis=1))
    target = np.clip(np.round(base.index_of(centres)[:, 0]), 0, base.shape[0] - 1).astype(int)
    for column, value in enumerate((LIVER, TUMOUR)):
        np.add.at(counts[:, column], target, (label.voxels == value).sum(axis=(1, 2)))
    return counts


def _native(base: Grid, start: int, slices: int) -> Slab:
    grid = base.cropped((start, 0, 0), (slices, *base.shape[1:]))
    return Slab(grid, (max(0, -start), min(slices, base.shape[0] - start)))


def _stretched(base: Grid, low: float, high: float, slices: int) -> Slab:
    """`slices` slices whose outer faces lie at `low` and `high` (in slices of `base`, counted from its lower face)."""
    step = (high - low) / slices
    affine = base.affine.copy()
    affine[:3, 2] = base.affine[:3, 2] * step
    affine[:3, 3] = base.world_mm(np.array([low + step / 2 - 0.5, 0, 0]))
    return Slab(Grid((slices, *base.shape[1:]), affine), (0, slices))


def _centred(low: float, high: float, length: int, slices: int) -> int:
    """Start of the slab around [low, high), moved into the scan where that is long enough, else centred on the scan."""
    if length <= slices:
        return -((slices - length) // 2)
    return int(np.clip(round((low + high - slices) / 2), 0, length - slices))


def _fullest(counts: np.ndarray, slices: int) -> int:
    """First of the windows with most tumour, then most liver."""
    if len(counts) <= slices:
        return _centred(0, len(counts), len(counts), slices)
    sums = np.cumsum(np.vstack([np.zeros(2), counts]), axis=0)
    windows = sums[slices:] - sums[:-slices]
    return int(np.lexsort((np.arange(len(windows)), -windows[:, 0], -windows[:, 1]))[0])


def _tiles(low: float, high: float, length: int, slices: int) -> list[int]:
    if length <= slices or high - low <= slices:
        return [_centred(low, high, length, slices)]
    last = int(min(np.ceil(high), length)) - slices
    starts = list(range(max(0, int(low)), last, TILE_STEP))
    return [*starts, last]
