"""Resampling between grids at any angle, point by point; the slow general path of `resample`."""

import numpy as np
from scipy import ndimage

from liverseg_dist.volume import Grid, Volume

BLOCK_VOXELS = 1 << 20
"""Voxels computed at once: their coordinates in float64 need 24 bytes each."""


def resample_rotated(volume: Volume, grid: Grid, is_label: bool, fill: float) -> np.ndarray:
    """Resample to any grid: nearest neighbour for labels, linear for the rest.

    Args:
        volume: The input.
        grid: The grid of the result.
        is_label: Whether the values are classes, which cannot be averaged.
        fill: Value of voxels whose centre is outside the input.

    Returns:
        Voxels on `grid` in the input's data type.
    """
    out = np.empty(grid.shape, dtype=volume.voxels.dtype)
    is_integer = np.issubdtype(out.dtype, np.integer)
    last = np.asarray(volume.shape) - 1
    depth, height, width = grid.shape
    # Blocks of slices: the coordinates of a whole scan would need 24 times its voxels.
    slices = max(1, BLOCK_VOXELS // (height * width))
    in_plane = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    for start in range(0, depth, slices):
        stop = min(start + slices, depth)
        index = np.empty((stop - start, height, width, 3))
        index[..., 0] = np.arange(start, stop)[:, None, None]
        index[..., 1:] = in_plane
        positions = volume.grid.index_of(grid.world_mm(index))
        inside = ((positions >= -0.5) & (positions <= last + 0.5)).all(axis=-1)
        # Half a voxel beyond the outer centres still belongs to the input: repeat the edge there.
        positions = np.clip(positions, 0, last)
        if is_label:
            nearest = np.floor(positions + 0.5).astype(np.int64)
            values = volume.voxels[nearest[..., 0], nearest[..., 1], nearest[..., 2]]
        else:
            values = ndimage.map_coordinates(
                volume.voxels, np.moveaxis(positions, -1, 0), np.float32, order=1, mode="nearest"
            )
            # Rounded, because a conversion to integers would truncate.
            values = np.rint(values) if is_integer else values
        out[start:stop] = np.where(inside, values, fill)
    return out
