"""Resample a volume onto another grid in the same world: `resample_to_grid(volume, grid, kind)`.

Grids whose axes are parallel (in any order and direction) are the rule, and are done axis by axis with the matrices of
`resample_axis`; whole-voxel shifts, crops and flips come out bit for bit. A rotated grid takes the general path:
nearest for labels, linear for the rest.

- `image`: cubic spline; across thick slices (voxels over 3 times longer than wide: nnU-Net's rule) linear. Integers are
  rounded; values stay within the input's range. When voxels grow, a Gaussian of (factor - 1) / 2 voxels keeps
  noise from folding back (scikit-image's rule: nothing to speak of below a factor of 1.5).
- `label`: linear on each class's mask, the most likely class wins. Places are read NUDGE voxels on: where voxels double
  in size every place lies halfway between two, and settling all those ties for one side costs (or gives) small
  tumours up to a quarter of their volume.
- `probabilities`: linear.
Voxels whose centre lies outside the input become `fill`. Work goes slab by slab: beside input and output about 100 MB.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import ndimage
from threadpoolctl import threadpool_limits

from liverseg_dist.data.preprocessing.resample_axis import (
    Band,
    Order,
    SamplePositions,
    matrix_bands,
)
from liverseg_dist.errors import UserError
from liverseg_dist.volume import Grid, Volume

Kind = Literal["image", "label", "probabilities"]

threadpool_limits(1, user_api="blas")
"""For good: a product's last bits depend on how many threads compute it, and stores and masks must not. Cases and
windows are what runs side by side. An environment variable would do only where it is set before NumPy is imported."""

AIR_HU = -1024
THICK = 3.0
"""Slices are thick when a voxel is longer than this many times its shortest side."""
PARALLEL_TOLERANCE = 0.05
"""Voxels by which axes may run apart over the whole grid and still count as parallel."""
MAX_VOXELS = 2**30
NUDGE = 5e-4
SLAB_VOXELS = 4 << 20
SLICES = 8
PLANE_BLOCK = 64
"""Rows of a matrix multiplied at once, across slices and in plane."""


@dataclass(frozen=True)
class Interpolation:
    """Spline degrees for images: along thin axes, and across thick slices; smoothing when voxels grow."""

    order: Order = 3
    thick_order: Order = 1
    antialias: bool = True


CUBIC = Interpolation()


def resample_to_grid(
    volume: Volume,
    grid: Grid,
    kind: Kind = "image",
    *,
    interpolation: Interpolation = CUBIC,
    fill: float | None = None,
) -> Volume:
    """`volume` at the voxel centres of `grid`, in the volume's own data type; `fill` defaults to air, class 0 or 0."""
    if grid.shape == volume.shape and grid.matches(volume.grid, tolerance_mm=1e-3):
        return Volume(volume.voxels, grid)
    if math.prod(grid.shape) > MAX_VOXELS:
        sizes = " x ".join(map(str, grid.shape))
        raise UserError(
            f"resampling would make {sizes} voxels; are the voxel sizes in the scan's header right?"
        )
    if fill is None:
        fill = AIR_HU if kind == "image" else 0
    aligned = align_axes(volume.grid, grid)
    if aligned is None:
        return Volume(_resample_rotated(volume, grid, kind, fill), grid)
    axes, towards = aligned
    voxels = volume.voxels.transpose(axes)
    voxels = voxels[tuple(slice(None, None, -1 if place.step < 0 else 1) for place in towards)]
    places = [place.mirrored() if place.step < 0 else place for place in towards]
    if all(place.indices() is not None for place in places):
        return Volume(_pick(voxels, places, fill), grid)
    if kind == "label":
        return Volume(_resample_label(voxels, places, int(fill)), grid)
    out = np.empty(grid.shape, dtype=voxels.dtype)
    orders = _orders(volume.grid, grid, axes, interpolation) if kind == "image" else (1, 1, 1)
    _resample_values(
        voxels, out, _axes(places, orders, interpolation.antialias and kind == "image"), fill
    )
    return Volume(out, grid)


def resample_probabilities(
    probabilities_czyx: np.ndarray, source: Grid, target: Grid
) -> np.ndarray:
    """Linear, channel by channel: (C, z, y, x) on `source` -> float32 (C, z, y, x) on `target`; outside: 0."""
    out = np.empty((len(probabilities_czyx), *target.shape), dtype=np.float32)
    for channel, values in enumerate(probabilities_czyx):
        out[channel] = resample_to_grid(Volume(values, source), target, "probabilities").voxels
    return out


def resample_nearest(label: Volume, grid: Grid, fill: int = 0) -> Volume:
    """Each voxel of `grid` takes the nearest voxel of `label`: for labels drawn on another grid, whatever its angle."""
    return Volume(_resample_rotated(label, grid, "label", fill), grid)


def align_axes(
    source: Grid, target: Grid
) -> tuple[tuple[int, int, int], tuple[SamplePositions, SamplePositions, SamplePositions]] | None:
    """How target axes run along source axes: (source axis of each target axis, places on it); None when rotated."""
    change = np.linalg.inv(source.affine) @ target.affine
    linear = change[:3, :3][::-1, ::-1]  # rows: source z, y, x; columns: target z, y, x
    offset = change[:3, 3][::-1]
    axes = [int(a) for a in np.argmax(np.abs(linear), axis=0)]
    if sorted(axes) != [0, 1, 2]:
        return None
    drift = np.abs(linear) * (np.asarray(target.shape) - 1)
    drift[axes, [0, 1, 2]] = 0
    if drift.sum(axis=1).max() > PARALLEL_TOLERANCE:
        return None
    z, y, x = (
        SamplePositions(
            source.shape[axis], target.shape[n], _tidy(offset[axis]), _tidy(linear[axis, n])
        )
        for n, axis in enumerate(axes)
    )
    return (axes[0], axes[1], axes[2]), (z, y, x)


def _tidy(value: float) -> float:
    """Rid of the noise of inverting an affine, so that equal grids share a matrix."""
    return float(round(value, 9))


def _orders(
    source: Grid, target: Grid, axes: Sequence[int], interpolation: Interpolation
) -> tuple[Order, Order, Order]:
    """Spline degree per target axis: `thick_order` across thick slices of either grid."""
    orders = [interpolation.order] * 3
    for spacing in ([source.spacing_mm[axis] for axis in axes], list(target.spacing_mm)):
        longest = max(spacing)
        if longest > THICK * min(spacing) and spacing.count(longest) == 1:
            orders[spacing.index(longest)] = min(interpolation.thick_order, interpolation.order)
            break
    return orders[0], orders[1], orders[2]


# --- axis by axis; steps are positive from here on --------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """One axis ready to be resampled: whole-voxel `index`, or else `matrix_bands` of a matrix."""

    places: SamplePositions
    index: np.ndarray | None
    bands: tuple[Band, ...]


def _axes(
    places: Sequence[SamplePositions], orders: Sequence[Order], antialias: bool
) -> list[_Axis]:
    result = []
    for place, order, block in zip(places, orders, (SLICES, PLANE_BLOCK, PLANE_BLOCK), strict=True):
        index = place.indices()
        if index is not None:
            result.append(_Axis(place, np.clip(index, 0, place.length - 1), ()))
        else:
            result.append(_Axis(place, None, matrix_bands(place, order, antialias, block)))
    return result


def _resample_values(
    voxels: np.ndarray, out: np.ndarray, axes: Sequence[_Axis], fill: float
) -> None:
    """Resample an image or one channel into `out`, rounded and kept in the input's range where it holds integers."""
    whole = np.issubdtype(out.dtype, np.integer)
    low, high = float(voxels.min()), float(voxels.max())
    inside_z, inside_y, inside_x = (axis.places.inside() for axis in axes)
    for start, stop, block in _blocks(voxels, axes, lambda part: part):
        np.clip(block, low, high, out=block)
        block[~inside_z[start:stop]] = fill
        block[:, ~inside_y] = fill
        block[:, :, ~inside_x] = fill
        out[start:stop] = np.rint(block, out=block) if whole else block


def _blocks(
    voxels: np.ndarray, axes: Sequence[_Axis], numbers: Callable[[np.ndarray], np.ndarray]
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(start, stop, float32 slices) of the result, slab by slab; `numbers` makes numbers of the input's voxels.

    Slices that the next slab needs again stay in a window, so that each is resampled in plane once.
    """
    axis_z, axis_y, axis_x = axes
    window = np.empty((0, axis_y.places.count, axis_x.places.count), dtype=np.float32)
    window_low = 0
    for start, stop, low, high in _slabs(axis_z):
        if low == high:  # these slices lie wholly outside the input
            yield start, stop, np.zeros((stop - start, *window.shape[1:]), dtype=np.float32)
            continue
        done = window_low + len(window)
        kept = window[max(low - window_low, 0) :] if low < done else window[:0]
        first_new = max(low, done) if len(kept) else low
        fresh = [
            _in_plane(numbers(voxels[z : z + SLICES][: high - z]), axis_y, axis_x)
            for z in range(first_new, high, SLICES)
        ]
        window, window_low = np.concatenate([kept, *fresh]), low
        yield start, stop, _across(window, window_low, axis_z, start, stop)


def _slabs(axis: _Axis) -> Iterator[tuple[int, int, int, int]]:
    """Output slices [start, stop) and the input slices [low, high) they depend on."""
    if axis.index is None:
        for band in axis.bands:
            yield band.start, band.stop, band.low, band.high
        return
    for start in range(0, axis.places.count, SLICES):
        index = axis.index[start : start + SLICES]
        yield start, start + len(index), int(index[0]), int(index[-1]) + 1


def _across(window: np.ndarray, window_low: int, axis: _Axis, start: int, stop: int) -> np.ndarray:
    if axis.index is not None:
        return window[axis.index[start:stop] - window_low]
    band = axis.bands[start // SLICES]
    used = window[band.low - window_low : band.high - window_low]
    return (band.weights @ used.reshape(len(used), -1)).reshape(stop - start, *window.shape[1:])


def _in_plane(part: np.ndarray, axis_y: _Axis, axis_x: _Axis) -> np.ndarray:
    """Float32 slices (n, y, x) resampled along x, then y."""
    slices = np.ascontiguousarray(part, dtype=np.float32)
    count, height, _ = slices.shape
    if axis_x.index is not None:
        slices = slices[:, :, axis_x.index]
    else:
        rows = slices.reshape(count * height, -1)
        wide = np.empty((len(rows), axis_x.places.count), dtype=np.float32)
        for band in axis_x.bands:
            np.matmul(
                rows[:, band.low : band.high], band.weights.T, out=wide[:, band.start : band.stop]
            )
        slices = wide.reshape(count, height, -1)
    if axis_y.index is not None:
        return slices[:, axis_y.index]
    result = np.empty((count, axis_y.places.count, slices.shape[2]), dtype=np.float32)
    for band in axis_y.bands:
        np.matmul(
            band.weights, slices[:, band.low : band.high], out=result[:, band.start : band.stop]
        )
    return result


def _pick(voxels: np.ndarray, places: Sequence[SamplePositions], fill: float) -> np.ndarray:
    """Every output voxel is an input voxel or outside: strided slices do it."""
    out = np.full([place.count for place in places], fill, dtype=voxels.dtype)
    into, source = [], []
    for place in places:
        inside = np.flatnonzero(place.inside())
        if not inside.size:
            return out
        start, stop = int(inside[0]), int(inside[-1]) + 1
        index = np.rint(place.coordinates()[start:stop]).astype(int)
        step = int(index[1] - index[0]) if len(index) > 1 else 1
        into.append(slice(start, stop))
        source.append(slice(int(index[0]), int(index[-1]) + 1, step))
    out[tuple(into)] = voxels[tuple(source)]
    return out


def _resample_label(voxels: np.ndarray, places: Sequence[SamplePositions], fill: int) -> np.ndarray:
    """The most likely class at each place; only the box around voxels that are not `fill` is computed."""
    out = np.full([place.count for place in places], fill, dtype=voxels.dtype)
    box = _box(voxels, places, fill)
    if box is None:
        return out
    source, into = box
    sub = voxels[source]
    inner = [
        p.part(s.start, s.stop, t.start, t.stop)
        for p, s, t in zip(places, source, into, strict=True)
    ]
    inner = [p if p.indices() is not None else replace(p, first=p.first + NUDGE) for p in inner]
    axes = _axes(inner, (1, 1, 1), antialias=False)
    classes = [int(value) for value in _values(sub) if value != fill]
    streams = [_blocks(sub, axes, lambda part, value=value: part == value) for value in classes]  # type: ignore[misc]
    target = out[into]
    for shares in zip(*streams, strict=True):
        start, stop, _ = shares[0]
        best = 1 - sum(share for _, _, share in shares)
        chosen = target[start:stop]
        for value, (_, _, share) in zip(classes, shares, strict=True):
            wins = share > best
            chosen[wins] = value
            np.maximum(best, share, out=best)
    return out


def _box(
    voxels: np.ndarray, places: Sequence[SamplePositions], fill: int
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """(input box around all voxels that are not `fill` with one voxel of margin, the outputs it reaches)."""
    occupied = voxels != fill
    source, into = [], []
    for axis, place in enumerate(places):
        used = np.flatnonzero(
            occupied.any(axis=tuple(other for other in range(3) if other != axis))
        )
        if not used.size:
            return None
        low, high = max(int(used[0]) - 1, 0), min(int(used[-1]) + 2, place.length)
        at = place.coordinates()
        reached = np.flatnonzero(place.inside() & (at >= low - 0.5) & (at <= high - 0.5))
        if not reached.size:
            return None
        source.append(slice(low, high))
        into.append(slice(int(reached[0]), int(reached[-1]) + 1))
    return tuple(source), tuple(into)


def _values(labels: np.ndarray) -> np.ndarray:
    return np.unique(np.concatenate([np.unique(slice_yx) for slice_yx in labels]))


# --- rotated ----------------------------------------------------------------------------------------------------------


def _resample_rotated(volume: Volume, grid: Grid, kind: Kind, fill: float) -> np.ndarray:
    """Any grid to any other, point by point."""
    out = np.empty(grid.shape, dtype=volume.voxels.dtype)
    last = np.asarray(volume.shape) - 1
    plane = grid.shape[1] * grid.shape[2]
    step = max(1, SLAB_VOXELS // (4 * plane))
    rows = np.stack(
        np.meshgrid(np.arange(grid.shape[1]), np.arange(grid.shape[2]), indexing="ij"), axis=-1
    )
    for start in range(0, grid.shape[0], step):
        stop = min(start + step, grid.shape[0])
        index = np.empty((stop - start, *grid.shape[1:], 3))
        index[..., 0] = np.arange(start, stop)[:, None, None]
        index[..., 1:] = rows
        at = volume.grid.index_of(grid.world_mm(index))
        inside = ((at >= -0.5) & (at <= last + 0.5)).all(axis=-1)
        at = np.clip(at, 0, last)
        if kind == "label":
            nearest = np.floor(at + 0.5).astype(np.int64)
            values = volume.voxels[nearest[..., 0], nearest[..., 1], nearest[..., 2]]
        else:
            values = ndimage.map_coordinates(
                volume.voxels, np.moveaxis(at, -1, 0), np.float32, order=1, mode="nearest"
            )
            values = np.rint(values) if np.issubdtype(out.dtype, np.integer) else values
        out[start:stop] = np.where(inside, values, fill)
    return out
