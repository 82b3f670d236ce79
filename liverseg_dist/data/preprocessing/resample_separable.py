"""Resampling axis by axis between grids with parallel axes; the fast path of `resample`.

Each axis is either a selection of input voxels or a product with a banded matrix (`resample_axis`).
The result is computed in blocks of slices, so that memory does not grow with the volume. All steps
along the axes are positive here: `resample` flips the input beforehand.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from liverseg_dist.data.preprocessing.resample_axis import (
    Band,
    Order,
    SamplePositions,
    matrix_bands,
)

NUDGE = 5e-4
"""Voxels by which labels are sampled off the exact position.

When the voxel size doubles, every position is halfway between two voxels. Resolving all these ties
to the same side would change the volume of small tumours by up to a quarter.
"""
BLOCK_SLICES = 8
PLANE_BLOCK = 64
"""Rows of a matrix multiplied at once: BLOCK_SLICES across slices, PLANE_BLOCK in plane."""


@dataclass(frozen=True)
class Interpolation:
    """Interpolation of images: spline degrees along thin axes and across thick slices."""

    order: Order = 3
    thick_order: Order = 1
    antialias: bool = True
    """Smooth before voxels grow."""


@dataclass(frozen=True)
class AxisPlan:
    """How one axis is resampled: by `index` (whole voxels) or else by the `bands` of a matrix."""

    positions: SamplePositions
    index: np.ndarray | None
    bands: tuple[Band, ...]


def plan_axes(
    positions: Sequence[SamplePositions], orders: Sequence[Order], antialias: bool
) -> list[AxisPlan]:
    """The plans of the axes z, y, x."""
    plans = []
    block_sizes = (BLOCK_SLICES, PLANE_BLOCK, PLANE_BLOCK)
    for axis, order, block in zip(positions, orders, block_sizes, strict=True):
        # An axis of whole steps needs no product, for any degree.
        index = axis.nearest_indices()
        if index is not None:
            plans.append(AxisPlan(axis, np.clip(index, 0, axis.length - 1), ()))
        else:
            plans.append(AxisPlan(axis, None, matrix_bands(axis, order, antialias, block)))
    return plans


def resample_values(
    voxels: np.ndarray, out: np.ndarray, axes: Sequence[AxisPlan], fill: float
) -> None:
    """Resample an image or one channel into `out`.

    Values stay within the input's range, because a cubic spline overshoots at edges. Integers are
    rounded.
    """
    is_integer = np.issubdtype(out.dtype, np.integer)
    # Once for the whole input: the range of a block would differ from slice to slice.
    low, high = float(voxels.min()), float(voxels.max())
    inside_z, inside_y, inside_x = (axis.positions.inside() for axis in axes)
    for start, stop, block in _stream_blocks(voxels, axes, lambda slices: slices):
        np.clip(block, low, high, out=block)
        block[~inside_z[start:stop]] = fill
        block[:, ~inside_y] = fill
        block[:, :, ~inside_x] = fill
        out[start:stop] = np.rint(block, out=block) if is_integer else block


def copy_voxels(
    voxels: np.ndarray, positions: Sequence[SamplePositions], fill: float
) -> np.ndarray:
    """Resample by strided slices, for outputs that are input voxels or outside the input."""
    out = np.full([axis.count for axis in positions], fill, dtype=voxels.dtype)
    target, source = [], []
    for axis in positions:
        inside = np.flatnonzero(axis.inside())
        if not inside.size:
            return out
        start, stop = int(inside[0]), int(inside[-1]) + 1
        index = np.rint(axis.coordinates()[start:stop]).astype(int)
        # Positions are equidistant, so a slice with a step selects them without a copy of indices.
        step = int(index[1] - index[0]) if len(index) > 1 else 1
        target.append(slice(start, stop))
        source.append(slice(int(index[0]), int(index[-1]) + 1, step))
    out[tuple(target)] = voxels[tuple(source)]
    return out


def resample_label(
    voxels: np.ndarray, positions: Sequence[SamplePositions], fill: int
) -> np.ndarray:
    """The most likely class at each position, by linear interpolation of each class's mask.

    Only the box around voxels that differ from `fill` is computed: a liver is small in a scan.
    """
    out = np.full([axis.count for axis in positions], fill, dtype=voxels.dtype)
    boxes = _find_label_boxes(voxels, positions, fill)
    if boxes is None:
        return out
    source_box, target_box = boxes
    source = voxels[source_box]
    box_positions = []
    for axis, inputs, outputs in zip(positions, source_box, target_box, strict=True):
        part = axis.part(inputs.start, inputs.stop, outputs.start, outputs.stop)
        if part.nearest_indices() is None:
            part = replace(part, first=part.first + NUDGE)
        box_positions.append(part)
    axes = plan_axes(box_positions, (1, 1, 1), antialias=False)
    # `fill` has no stream of its own: its share follows from the others.
    classes = [value for value in _list_values(source) if value != fill]
    streams = [_stream_blocks(source, axes, _class_mask(value)) for value in classes]
    target = out[target_box]
    # All classes advance together, block by block, so that no full-size share is kept in memory.
    for blocks in zip(*streams, strict=True):
        start, stop, _ = blocks[0]
        shares = [share for _, _, share in blocks]
        # The share of `fill` is what the other classes leave.
        best = 1 - sum(shares)
        chosen = target[start:stop]
        for value, share in zip(classes, shares, strict=True):
            is_best = share > best
            chosen[is_best] = value
            np.maximum(best, share, out=best)
    return out


def _class_mask(value: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda slices: slices == value


def _list_values(labels: np.ndarray) -> list[int]:
    """The values that occur; slice by slice, because `np.unique` copies its input."""
    values = np.unique(np.concatenate([np.unique(slice_yx) for slice_yx in labels]))
    return [int(value) for value in values]


def _find_label_boxes(
    voxels: np.ndarray, positions: Sequence[SamplePositions], fill: int
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """(input box around all voxels that differ from `fill`, the outputs that depend on it).

    The input box has a margin of one voxel, as far as linear interpolation reaches. None when no
    output is affected.
    """
    occupied = voxels != fill
    source, target = [], []
    for axis, axis_positions in enumerate(positions):
        other_axes = tuple(other for other in range(3) if other != axis)
        used = np.flatnonzero(occupied.any(axis=other_axes))
        if not used.size:
            return None
        # Linear interpolation reaches one voxel beyond the structure.
        low, high = max(int(used[0]) - 1, 0), min(int(used[-1]) + 2, axis_positions.length)
        coordinates = axis_positions.coordinates()
        is_affected = (coordinates >= low - 0.5) & (coordinates <= high - 0.5)
        reached = np.flatnonzero(axis_positions.inside() & is_affected)
        if not reached.size:
            return None
        source.append(slice(low, high))
        target.append(slice(int(reached[0]), int(reached[-1]) + 1))
    return tuple(source), tuple(target)


def _stream_blocks(
    voxels: np.ndarray,
    axes: Sequence[AxisPlan],
    to_numbers: Callable[[np.ndarray], np.ndarray],
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Compute the result in blocks of slices.

    Args:
        voxels: The input.
        axes: Plans of the axes z, y, x.
        to_numbers: Turns slices of the input into numbers (for labels: the mask of a class).

    Yields:
        (start, stop, float32 slices [start, stop) of the result).
    """
    axis_z, axis_y, axis_x = axes
    # Slices resampled in plane, from input slice `window_low` on. Those that the next block needs
    # too stay here, so that each slice is resampled in plane once.
    window = np.empty((0, axis_y.positions.count, axis_x.positions.count), dtype=np.float32)
    window_low = 0
    for start, stop, low, high in _iterate_blocks(axis_z):
        if low == high:
            # These slices are outside the input; the caller replaces them by `fill`.
            yield start, stop, np.zeros((stop - start, *window.shape[1:]), dtype=np.float32)
            continue
        window_high = window_low + len(window)
        # Only what the next block needs again is kept.
        kept = window[max(low - window_low, 0) :] if low < window_high else window[:0]
        first_new = max(low, window_high) if len(kept) else low
        parts = [kept]
        for z in range(first_new, high, BLOCK_SLICES):
            slices = voxels[z : min(z + BLOCK_SLICES, high)]
            parts.append(_resample_in_plane(to_numbers(slices), axis_y, axis_x))
        window, window_low = np.concatenate(parts), low
        yield start, stop, _resample_across(window, window_low, axis_z, start, stop)


def _iterate_blocks(axis: AxisPlan) -> Iterator[tuple[int, int, int, int]]:
    """Output slices [start, stop), and the input slices [low, high) that they depend on."""
    if axis.index is None:
        for band in axis.bands:
            yield band.start, band.stop, band.low, band.high
        return
    for start in range(0, axis.positions.count, BLOCK_SLICES):
        index = axis.index[start : start + BLOCK_SLICES]
        yield start, start + len(index), int(index[0]), int(index[-1]) + 1


def _resample_across(
    window: np.ndarray, window_low: int, axis: AxisPlan, start: int, stop: int
) -> np.ndarray:
    """Slices [start, stop) of the result from slices that are resampled in plane."""
    if axis.index is not None:
        return window[axis.index[start:stop] - window_low]
    band = axis.bands[start // BLOCK_SLICES]
    used = window[band.low - window_low : band.high - window_low]
    product = band.weights @ used.reshape(len(used), -1)
    return product.reshape(stop - start, *window.shape[1:])


def _resample_in_plane(slices_zyx: np.ndarray, axis_y: AxisPlan, axis_x: AxisPlan) -> np.ndarray:
    # x first: the rows of a slice are contiguous in memory.
    """Float32 slices (n, y, x) resampled along x, then y."""
    slices = np.ascontiguousarray(slices_zyx, dtype=np.float32)
    count, height, _ = slices.shape
    if axis_x.index is not None:
        slices = slices[:, :, axis_x.index]
    else:
        rows = slices.reshape(count * height, -1)
        resampled = np.empty((len(rows), axis_x.positions.count), dtype=np.float32)
        for band in axis_x.bands:
            inputs, outputs = rows[:, band.low : band.high], resampled[:, band.start : band.stop]
            np.matmul(inputs, band.weights.T, out=outputs)
        slices = resampled.reshape(count, height, -1)
    if axis_y.index is not None:
        return slices[:, axis_y.index]
    result = np.empty((count, axis_y.positions.count, slices.shape[2]), dtype=np.float32)
    for band in axis_y.bands:
        inputs, outputs = slices[:, band.low : band.high], result[:, band.start : band.stop]
        np.matmul(band.weights, inputs, out=outputs)
    return result
