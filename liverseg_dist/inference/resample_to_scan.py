"""Resample probabilities from the network's grid to the scan's own, a few slices at a time.

Probabilities are interpolated linearly and become labels afterwards, so edges are as smooth as the
scan's own voxels allow. Both grids have parallel axes (the network's grid is the reoriented scan
with other voxel sizes, perhaps cropped or padded), so the interpolation is separable. Voxels
outside the network's field of view are background. Used by `segment_scan` and `case_inputs`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from liverseg_dist.errors import RunFailed
from liverseg_dist.volume import Grid

CHUNK_SLICES = 8
"""Slices of the scan's grid that are interpolated at once."""
TOLERANCE_VOXELS = 1e-3
"""Positions this near to a voxel are rounded to it, so that equal grids give an exact copy."""
MAX_SKEW_VOXELS = 0.5
"""Deviation from parallel axes over the whole scan that is accepted."""
Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class AxisMap:
    """Positions of the scan's voxels between the network's voxels along one axis.

    Attributes:
        first: first voxel of the scan inside the network's field of view.
        lower: per voxel from `first`, index of the network's voxel below.
        upper: index of the network's voxel above.
        weight: weight of `upper`, float32; `lower` has the rest to 1.
    """

    first: int
    lower: np.ndarray
    upper: np.ndarray
    weight: np.ndarray

    @classmethod
    def from_positions(
        cls, offset: float, step: float, source_length: int, target_length: int
    ) -> "AxisMap":
        """The map where target voxel t is at `offset + step * t` on the source's axis.

        Args:
            offset: position of the first target voxel, in source voxels.
            step: distance of target voxels in source voxels, above 0.
            source_length: voxels of the source.
            target_length: voxels of the target.
        """
        position = offset + step * np.arange(target_length)
        nearest = np.rint(position)
        # Headers store affines in single precision; without rounding equal grids would be
        # interpolated.
        position = np.where(np.abs(position - nearest) < TOLERANCE_VOXELS, nearest, position)
        # The field of view ends half a voxel beyond the centres of the outermost voxels.
        inside = np.flatnonzero((position >= -0.5) & (position <= source_length - 0.5))
        position = np.clip(position[inside], 0, source_length - 1)
        lower = np.floor(position).astype(np.int64)
        upper = np.minimum(lower + 1, source_length - 1)
        weight = (position - lower).astype(np.float32)
        return cls(int(inside[0]) if inside.size else 0, lower, upper, weight)

    def __len__(self) -> int:
        return len(self.lower)

    @property
    def target(self) -> slice:
        """The scan's voxels inside the network's field of view."""
        return slice(self.first, self.first + len(self))

    @property
    def is_copy(self) -> bool:
        """Whether each voxel of the scan is exactly one of the network's consecutive voxels."""
        return not self.weight.any() and bool((np.diff(self.lower) == 1).all())

    def interpolate(self, values: Tensor, dim: int) -> Tensor:
        """Interpolate along a dimension."""
        if self.is_copy:
            return values.narrow(dim, int(self.lower[0]), len(self))
        lower = torch.from_numpy(self.lower).to(values.device)
        upper = torch.from_numpy(self.upper).to(values.device)
        shape = [1] * values.ndim
        shape[dim] = len(self)
        weight = torch.from_numpy(self.weight).to(values.device).view(shape)
        return torch.lerp(values.index_select(dim, lower), values.index_select(dim, upper), weight)


def compute_axis_maps(source: Grid, target: Grid) -> tuple[AxisMap, AxisMap, AxisMap]:
    """Maps along z, y, x from a target grid to a source grid of the same orientation.

    Raises:
        RunFailed: the axes of the grids are not parallel.
    """
    # The three unit steps of the target in source voxels: off-diagonal parts mean that the axes
    # are not parallel.
    origin = source.index_of(target.world_mm(np.zeros(3)))
    steps = source.index_of(target.world_mm(np.eye(3))) - origin
    scale = np.diag(steps)
    # The deviation grows with the distance, so the largest axis of the scan decides.
    skew = np.abs(steps - np.diag(scale)) @ np.ones(3) * max(target.shape)
    if (scale <= 0).any() or skew.max() > MAX_SKEW_VOXELS:
        raise RunFailed(
            "the axes of the network's grid are not parallel to those of the scan; "
            "the prediction cannot be resampled to the scan"
        )
    maps = []
    for axis in range(3):
        maps.append(
            AxisMap.from_positions(
                float(origin[axis]), float(scale[axis]), source.shape[axis], target.shape[axis]
            )
        )
    return maps[0], maps[1], maps[2]


def resample_to_scan(
    slabs: Iterable[tuple[int, Tensor]], source: Grid, target: Grid
) -> Iterator[tuple[Box, Tensor]]:
    """Yield the probabilities on the target grid, from the first slice to the last.

    At most one slab, one slice and `CHUNK_SLICES` finished slices are in memory.

    Args:
        slabs: (first slice, values C D H W), without gaps along the source's z.
        source: grid of the slabs.
        target: grid of the scan, in the same orientation.

    Yields:
        Box of the target grid, and its values (C, D, H, W). Voxels outside the source's field of
        view are in no box.

    Raises:
        RunFailed: the axes of the grids are not parallel.
    """
    maps = compute_axis_maps(source, target)
    z = maps[0]
    # The network's field of view and the scan do not overlap along an axis.
    if not all(len(axis) for axis in maps):
        return
    plane = (maps[1].target, maps[2].target)
    kept: Tensor | None = None
    done = 0
    for first, slab in slabs:
        held = slab if kept is None else torch.cat([kept, slab], dim=1)
        start = first + slab.shape[1] - held.shape[1]
        # Slices whose upper neighbour has arrived.
        ready = int(np.searchsorted(z.upper, start + held.shape[1]))
        while done < ready:
            end = min(done + CHUNK_SLICES, ready)
            chunk = AxisMap(
                0, z.lower[done:end] - start, z.upper[done:end] - start, z.weight[done:end]
            )
            values = chunk.interpolate(held, 1)
            values = maps[1].interpolate(values, 2)
            values = maps[2].interpolate(values, 3)
            yield (slice(z.first + done, z.first + end), *plane), values
            done = end
        # The last slice is the lower neighbour of the next slab's first ones.
        kept = held[:, -1:].clone()
        del held, slab
