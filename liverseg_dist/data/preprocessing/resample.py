"""Resamples a volume to another grid in the same world: `resample_to_grid(volume, grid, kind)`.

Grids with parallel axes (in any order and direction) are resampled axis by axis
(`resample_separable`); shifts by whole voxels, crops and flips are exact. A rotated grid is
resampled point by point: nearest neighbour for labels, linear for the rest. The kinds:

- `image`: cubic spline; linear across thick slices (voxels over 3 times longer than wide, nnU-Net's
  rule). Integers are rounded; values stay within the input's range. When voxels grow, a Gaussian of
  (factor - 1) / 2 voxels prevents aliasing of noise (scikit-image's rule: small effect below 1.5).
- `label`: linear interpolation of each class's mask; the most likely class wins.
- `probabilities`: linear.

Voxels whose centre is outside the input become `fill`. Work is done in blocks of slices: about 100
MB in addition to input and output.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from threadpoolctl import threadpool_limits

from liverseg_dist.data.preprocessing.resample_axis import Order, SamplePositions
from liverseg_dist.data.preprocessing.resample_rotated import resample_rotated
from liverseg_dist.data.preprocessing.resample_separable import (
    Interpolation,
    copy_voxels,
    plan_axes,
    resample_label,
    resample_values,
)
from liverseg_dist.errors import UserError
from liverseg_dist.volume import Grid, Volume

Kind = Literal["image", "label", "probabilities"]

# Permanent: the last bits of a matrix product depend on the number of threads that compute it, and
# the bytes of stores and masks must not. Cases and windows are what runs in parallel. An
# environment variable has an effect only when it is set before NumPy is imported.
threadpool_limits(1, user_api="blas")

AIR_HU = -1024
THICK_RATIO = 3.0
"""Slices are thick when a voxel is longer than this many times its shortest side."""
PARALLEL_TOLERANCE = 0.05
"""Voxels by which axes may deviate over the whole grid and still count as parallel."""
MAX_VOXELS = 2**30

CUBIC = Interpolation()


def resample_to_grid(
    volume: Volume,
    grid: Grid,
    kind: Kind = "image",
    *,
    interpolation: Interpolation = CUBIC,
    fill: float | None = None,
) -> Volume:
    """Resample a volume at the voxel centres of a grid.

    Args:
        volume: The input, on any grid.
        grid: The grid of the result.
        kind: How values are interpolated (module docstring).
        interpolation: Degrees of the splines, for images.
        fill: Value outside the input; default: air for images, 0 for the rest.

    Returns:
        The volume on `grid` in the input's data type. For equal grids it shares the voxels.

    Raises:
        UserError: The result would have more than 2^30 voxels.
        ValueError: The kind is unknown.
    """
    # The type is checked by mypy, but the kind may come from a setting.
    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind {kind!r}; use one of {', '.join(get_args(Kind))}")
    # Within a micrometre the grids are equal: interpolation would only add rounding errors.
    if grid.shape == volume.shape and grid.matches(volume.grid, tolerance_mm=1e-3):
        return Volume(volume.voxels, grid)
    # A header with voxels in micrometres would ask for terabytes.
    if math.prod(grid.shape) > MAX_VOXELS:
        sizes = " x ".join(map(str, grid.shape))
        raise UserError(
            f"resampling would produce {sizes} voxels; check the voxel sizes in the scan's header"
        )
    if fill is None:
        fill = AIR_HU if kind == "image" else 0
    aligned = align_axes(volume.grid, grid)
    if aligned is None:
        return Volume(resample_rotated(volume, grid, kind == "label", fill), grid)
    axes, signed_positions = aligned
    # Reorder and flip the input (a view), so that all steps along the axes are positive.
    voxels = volume.voxels.transpose(axes)
    flips = tuple(slice(None, None, -1 if axis.step < 0 else 1) for axis in signed_positions)
    voxels = voxels[flips]
    positions = [axis.mirrored() if axis.step < 0 else axis for axis in signed_positions]
    # Whole voxels are copied: interpolation at voxel centres would only add rounding errors.
    if all(axis.nearest_indices() is not None for axis in positions):
        return Volume(copy_voxels(voxels, positions, fill), grid)
    if kind == "label":
        return Volume(resample_label(voxels, positions, int(fill)), grid)
    orders: tuple[Order, Order, Order] = (1, 1, 1)
    if kind == "image":
        orders = _choose_orders(volume.grid, grid, axes, interpolation)
    antialias = interpolation.antialias and kind == "image"
    # Written block by block into one array, so that memory holds input and output only.
    out = np.empty(grid.shape, dtype=voxels.dtype)
    resample_values(voxels, out, plan_axes(positions, orders, antialias), fill)
    return Volume(out, grid)


def resample_probabilities(
    probabilities_czyx: np.ndarray, source: Grid, target: Grid
) -> np.ndarray:
    """Resample each channel linearly.

    Args:
        probabilities_czyx: (C, z, y, x) on `source`.
        source: Grid of the input.
        target: Grid of the result.

    Returns:
        Float32 (C, z, y, x) on `target`; 0 outside the input.
    """
    out = np.empty((len(probabilities_czyx), *target.shape), dtype=np.float32)
    for channel, values in enumerate(probabilities_czyx):
        out[channel] = resample_to_grid(Volume(values, source), target, "probabilities").voxels
    return out


def resample_nearest(label: Volume, grid: Grid, fill: int = 0) -> Volume:
    """Each voxel of `grid` takes the nearest voxel of `label`, at any angle between the grids.

    For labels that were drawn on another grid than the image's.
    """
    return Volume(resample_rotated(label, grid, is_label=True, fill=fill), grid)


def align_axes(
    source: Grid, target: Grid
) -> tuple[tuple[int, int, int], tuple[SamplePositions, SamplePositions, SamplePositions]] | None:
    """How the axes of the target run along those of the source.

    Returns:
        (source axis of each target axis, sample positions on it); None for rotated grids.
    """
    change = np.linalg.inv(source.affine) @ target.affine
    linear = change[:3, :3][::-1, ::-1]  # rows: source z, y, x; columns: target z, y, x
    offset = change[:3, 3][::-1]
    axes = [int(axis) for axis in np.argmax(np.abs(linear), axis=0)]
    # Two target axes along one source axis: the grids are rotated by about 45 degrees.
    if sorted(axes) != [0, 1, 2]:
        return None
    # The rest of the matrix is the deviation from parallel axes, in voxels at the last voxel.
    drift = np.abs(linear) * (np.asarray(target.shape) - 1)
    drift[axes, [0, 1, 2]] = 0
    if drift.sum(axis=1).max() > PARALLEL_TOLERANCE:
        return None
    positions = []
    for target_axis, axis in enumerate(axes):
        first, step = _remove_noise(offset[axis]), _remove_noise(linear[axis, target_axis])
        length, count = source.shape[axis], target.shape[target_axis]
        positions.append(SamplePositions(length, count, first, step))
    return (axes[0], axes[1], axes[2]), (positions[0], positions[1], positions[2])


def _remove_noise(value: float) -> float:
    """Round away the error of inverting an affine, so that equal grids share a cached matrix."""
    return float(round(value, 9))


def _choose_orders(
    source: Grid, target: Grid, axes: Sequence[int], interpolation: Interpolation
) -> tuple[Order, Order, Order]:
    """Spline degree per target axis: `thick_order` across thick slices of either grid."""
    orders = [interpolation.order] * 3
    for spacing in ([source.spacing_mm[axis] for axis in axes], list(target.spacing_mm)):
        longest = max(spacing)
        # One axis only: where two are equally long, none is the axis of the slices.
        if longest > THICK_RATIO * min(spacing) and spacing.count(longest) == 1:
            orders[spacing.index(longest)] = min(interpolation.thick_order, interpolation.order)
            break
    return orders[0], orders[1], orders[2]
