"""From the network's grid back to the scan's own: probabilities, linearly, a few slices at a time.

Probabilities are interpolated and only then become labels, so an edge comes out as smooth as the scan's own voxels
allow. Both grids have parallel axes (the network's is the reoriented scan with other voxel sizes, perhaps cropped or
padded), so the interpolation is separable. Whatever lies outside the network's field of view is background.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from liverseg_dist.errors import RunFailed
from liverseg_dist.volume import Grid

CHUNK_SLICES = 8
"""Slices of the scan's grid worked out at once."""
TOLERANCE_VOXELS = 1e-3
Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class AxisMap:
    """Where each voxel of the scan lies between the network's voxels along one axis."""

    first: int
    """First voxel of the scan inside the network's field of view."""
    lower: np.ndarray
    """Per voxel from `first`: index of the network's voxel below ..."""
    upper: np.ndarray
    """... and above."""
    weight: np.ndarray
    """Share of `upper`, float32."""

    @classmethod
    def from_positions(
        cls, offset: float, step: float, source_length: int, target_length: int
    ) -> "AxisMap":
        """Target voxel t lies at `offset + step * t` (step > 0) on the source's axis."""
        position = offset + step * np.arange(target_length)
        nearest = np.rint(position)
        position = np.where(np.abs(position - nearest) < TOLERANCE_VOXELS, nearest, position)
        inside = np.flatnonzero((position >= -0.5) & (position <= source_length - 0.5))
        position = np.clip(position[inside], 0, source_length - 1)
        lower = np.floor(position).astype(np.int64)
        upper = np.minimum(lower + 1, source_length - 1)
        return cls(
            int(inside[0]) if inside.size else 0,
            lower,
            upper,
            (position - lower).astype(np.float32),
        )

    def __len__(self) -> int:
        return len(self.lower)

    @property
    def target(self) -> slice:
        return slice(self.first, self.first + len(self))

    @property
    def source(self) -> slice:
        """The network's voxels when each voxel of the scan is one of them; see `is_copy`."""
        return slice(int(self.lower[0]), int(self.lower[-1]) + 1)

    @property
    def is_copy(self) -> bool:
        return not self.weight.any() and bool((np.diff(self.lower) == 1).all())

    def apply(self, values: Tensor, dim: int) -> Tensor:
        """Interpolate along a dimension."""
        if self.is_copy:
            return values.narrow(dim, self.source.start, len(self))
        lower, upper = (torch.from_numpy(i).to(values.device) for i in (self.lower, self.upper))
        shape = [1] * values.ndim
        shape[dim] = len(self)
        weight = torch.from_numpy(self.weight).to(values.device).view(shape)
        return torch.lerp(values.index_select(dim, lower), values.index_select(dim, upper), weight)


def compute_axis_maps(source: Grid, target: Grid) -> tuple[AxisMap, AxisMap, AxisMap]:
    """Maps along z, y, x from a target grid onto a source grid of the same orientation. Raises `RunFailed`."""
    origin = source.index_of(target.world_mm(np.zeros(3)))
    steps = source.index_of(target.world_mm(np.eye(3))) - origin
    scale = np.diag(steps)
    skew = np.abs(steps - np.diag(scale)) @ np.ones(3) * max(target.shape)
    if (scale <= 0).any() or skew.max() > 0.5:
        raise RunFailed(
            "the network's grid is turned against the scan's; a prediction cannot be brought back"
        )
    z, y, x = (
        AxisMap.from_positions(float(o), float(s), n, m)
        for o, s, n, m in zip(origin, scale, source.shape, target.shape, strict=True)
    )
    return z, y, x


def resample_to_scan(
    slabs: Iterable[tuple[int, Tensor]], source: Grid, target: Grid
) -> Iterator[tuple[Box, Tensor]]:
    """Yields (box of the target grid, its probabilities C D H W), from the first slice to the last.

    `slabs` are (first slice, C D H W) without gaps along the source's z. Target voxels outside the source's field of
    view are in no box. At most one slab, one slice and `CHUNK_SLICES` finished slices are held.
    """
    maps = compute_axis_maps(source, target)
    z = maps[0]
    if not all(len(axis) for axis in maps):
        return
    plane = (maps[1].target, maps[2].target)
    kept: Tensor | None = None
    done = 0
    for first, slab in slabs:
        held = slab if kept is None else torch.cat([kept, slab], dim=1)
        start = first + slab.shape[1] - held.shape[1]
        ready = int(np.searchsorted(z.upper, start + held.shape[1]))
        while done < ready:
            end = min(done + CHUNK_SLICES, ready)
            part = AxisMap(
                0, z.lower[done:end] - start, z.upper[done:end] - start, z.weight[done:end]
            )
            values = maps[2].apply(maps[1].apply(part.apply(held, 1), 2), 3)
            yield (slice(z.first + done, z.first + end), *plane), values
            done = end
        kept = held[:, -1:].clone()
        del held, slab
