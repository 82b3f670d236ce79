"""The 64 contiguous slices that hold the liver: where they lie, what is padding, and what the choice loses."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np

from liverseg_dist.config import SlabConfig
from liverseg_dist.data.findings import Finding
from liverseg_dist.labels import IGNORE, LIVER, TUMOUR
from liverseg_dist.volume import Float3, Grid, Volume

TILE_STEP = 48
"""Slices between the starts of neighbouring tiles: a quarter overlaps."""


@dataclass(frozen=True)
class Slab:
    """A grid of exactly 64 slices, and the range of them that lies within the scan."""

    grid: Grid
    valid_slices: tuple[int, int]


def place_slabs(
    scan: Grid, label: Volume | None, spacing_mm: Float3 | None, config: SlabConfig
) -> tuple[Slab, ...]:
    """Slabs for a RAS scan, from below. `label`: RAS, any spacing, same field of view.

    One slab for `fit` and `window`, one or more for `tile`. Without a label nobody knows where the liver is: tiles over
    the whole scan, whatever the policy. `spacing_mm` None keeps the scan's own voxels.
    """
    base = scan if spacing_mm is None else scan.with_spacing(spacing_mm)
    counts = _slice_counts(base, label)
    used = np.flatnonzero(counts.sum(axis=1))
    low, high = (float(used[0]), float(used[-1] + 1)) if used.size else (0.0, float(base.shape[0]))
    slices = config.slices
    policy = config.policy if label is not None else "tile"
    if policy == "fit":
        margin = config.margin_mm / base.spacing_mm[0]
        low, high = max(0.0, low - margin), min(float(base.shape[0]), high + margin)
        if high - low > slices:
            return (_stretched(base, low, high, slices),)
        return (_native(base, _centred(low, high, base.shape[0], slices), slices),)
    if policy == "window":
        return (_native(base, _fullest(counts, slices), slices),)
    return tuple(_native(base, start, slices) for start in _tiles(low, high, base.shape[0], slices))


def padded_label(label_zyx: np.ndarray, slab: Slab) -> np.ndarray:
    """The label with the slab's padding marked as no class at all."""
    padded = label_zyx.copy()
    padded[: slab.valid_slices[0]] = IGNORE
    padded[slab.valid_slices[1] :] = IGNORE
    return padded


def slab_coverage(
    label: Volume, slabs: Sequence[Slab], stored: Sequence[np.ndarray] = ()
) -> dict[str, Any]:
    """What the slabs keep of a scan's label: whole numbers that can be pooled, and shares of 1.

    Liver (with its tumours) and tumour voxels whose slice lies in a slab; tumours (26-connected) that are cut, or
    missed altogether; with the `stored` labels also tumours that lie inside but are too small to have a voxel left.
    """
    z = np.arange(label.shape[0])
    inside = np.zeros(label.shape[0], dtype=bool)
    for slab in slabs:
        ends = slab.grid.world_mm(np.array([[-0.5, 0, 0], [slab.grid.shape[0] - 0.5, 0, 0]]))
        first, last = sorted(label.grid.index_of(ends)[:, 0])
        inside |= (z >= first - 1e-6) & (z <= last + 1e-6)
    liver, tumour = per_slice(label.voxels)
    found: dict[str, Any] = {}
    for name, counts in (("liver", liver + tumour), ("tumour", tumour)):
        found[f"{name}_voxels"], found[f"{name}_voxels_inside"] = (
            int(counts.sum()),
            int(counts[inside].sum()),
        )
    box = _tumour_box(label.voxels, tumour)
    mask = np.ascontiguousarray(label.voxels[box] == TUMOUR)
    components, number = cc3d.connected_components(mask, connectivity=26, return_N=True)
    boxes = cc3d.statistics(components)["bounding_boxes"][1:] if number else []
    shares = [inside[box[0]][each[0]] for each in boxes]
    start = np.array([part.start for part in box])
    seen: set[int] = set()
    for slab, kept in zip(slabs, stored, strict=False):
        seen |= _seen(components, start, label.grid, slab.grid, kept)
    reached = {n for n, share in enumerate(shares, start=1) if share.any()}
    found["tumours"] = int(number)
    found["tumours_cut"] = sum(bool(share.any() and not share.all()) for share in shares)
    found["tumours_missed"] = int(number) - len(reached)
    found["tumours_vanished"] = len(reached - seen) if stored else 0
    return with_shares(found)


def per_slice(label_zyx: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of liver, and of tumour, in each slice."""
    counts = [
        [np.count_nonzero(slice_yx == value) for slice_yx in label_zyx] for value in (LIVER, TUMOUR)
    ]
    return np.array(counts[0]), np.array(counts[1])


def with_shares(found: Mapping[str, Any]) -> dict[str, Any]:
    shares = {
        f"{name}_inside": found[f"{name}_voxels_inside"] / found[f"{name}_voxels"]
        if found[f"{name}_voxels"]
        else 1.0
        for name in ("liver", "tumour")
    }
    return {**found, **shares}


def pooled_coverage(found: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """`slab_coverage` of several scans together."""
    total: dict[str, Any] = {}
    for one in found:
        for key, value in one.items():
            if isinstance(value, int):
                total[key] = total.get(key, 0) + value
    return with_shares(total) if total else {}


def describe_slabs(
    scan: Grid, slabs: Sequence[Slab], found: Mapping[str, Any] | None
) -> list[Finding]:
    """One sentence on where the slabs lie, and warnings about what they lose."""
    grid, (first, last) = slabs[0].grid, slabs[0].valid_slices
    step_mm, thickness_mm = grid.spacing_mm[0], scan.spacing_mm[0]
    thinned = (
        "" if abs(step_mm - thickness_mm) < 1e-3 else f" as {grid.shape[0]} of {step_mm:.3g} mm"
    )
    as_scanned = f"slices of {thickness_mm:.3g} mm{thinned}"
    faces = grid.world_mm(np.array([[first - 0.5, 0, 0], [last - 0.5, 0, 0]]))
    bottom, top = (round(float(at)) for at in scan.index_of(faces)[:, 0] + 0.5)
    if len(slabs) > 1:
        message = f"{len(slabs)} slabs of {grid.shape[0]}, {as_scanned}"
    elif last - first < grid.shape[0]:
        message = (
            f"slab: all {scan.shape[0]} {as_scanned}, and {grid.shape[0] - last + first} of padding"
        )
    else:
        message = f"slab: {top - bottom} of {scan.shape[0]} {as_scanned} (from {bottom}, counted from below)"
    notes = [Finding("info", "slab", message)]
    if found and found["liver_voxels_inside"] < found["liver_voxels"]:
        message = (
            f"outside the slab: {100 * (1 - found['liver_inside']):.1f} % of the liver, "
            f"{100 * (1 - found['tumour_inside']):.1f} % of tumour; of {found['tumours']} tumours "
            f"{found['tumours_cut']} cut, {found['tumours_missed']} missed"
        )
        notes.append(Finding("warning", "slab_loss", message))
    if found and found["tumours_vanished"]:
        message = f"{found['tumours_vanished']} of {found['tumours']} tumours are too small for the slab's voxels"
        notes.append(Finding("warning", "tumours_vanished", message))
    return notes


def _tumour_box(label_zyx: np.ndarray, tumour_per_slice: np.ndarray) -> tuple[slice, slice, slice]:
    """The smallest box around all tumour voxels; one voxel where there is none."""
    used = np.flatnonzero(tumour_per_slice)
    if not used.size:
        return slice(0, 1), slice(0, 1), slice(0, 1)
    z = slice(int(used[0]), int(used[-1]) + 1)
    plane = np.logical_or.reduce([slice_yx == TUMOUR for slice_yx in label_zyx[z]])
    y, x = (np.flatnonzero(plane.any(axis=axis)) for axis in (1, 0))
    return z, slice(int(y[0]), int(y[-1]) + 1), slice(int(x[0]), int(x[-1]) + 1)


def _seen(
    components: np.ndarray, start: np.ndarray, grid: Grid, stored_grid: Grid, stored: np.ndarray
) -> set[int]:
    """Numbers of the components (from voxel `start` of `grid` on) with a tumour voxel of `stored` in their place."""
    at = np.stack(np.unravel_index(np.flatnonzero(stored == TUMOUR), stored.shape), axis=1)
    index = np.rint(grid.index_of(stored_grid.world_mm(at))).astype(int) - start
    index = index[((index >= 0) & (index < components.shape)).all(axis=1)]
    return set(np.unique(components[tuple(index.T)]).tolist()) - {0}


def _slice_counts(base: Grid, label: Volume | None) -> np.ndarray:
    """(slices of base, 2): liver and tumour voxels of the label that fall into each slice."""
    counts = np.zeros((base.shape[0], 2))
    if label is None:
        counts[:, 0] = 1
        return counts
    z = np.arange(label.shape[0], dtype=float)
    centres = label.grid.world_mm(np.stack([z, np.zeros_like(z), np.zeros_like(z)], axis=1))
    target = np.clip(np.round(base.index_of(centres)[:, 0]), 0, base.shape[0] - 1).astype(int)
    for column, found in enumerate(per_slice(label.voxels)):
        np.add.at(counts[:, column], target, found)
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
