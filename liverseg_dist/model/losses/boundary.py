"""Boundary loss: a wrong voxel costs as much as it lies away from the true surface.

https://arxiv.org/abs/1812.07032, with the signed distance cut off at some voxels' reach. So the distance is exact and
found by shifts on the device that trains, no label goes back to the CPU, and a far error does not outweigh all others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def boundary_term(
    probability: Tensor, target: Tensor, valid_B1DHW: Tensor, reach: int, spacing: Sequence[float]
) -> Tensor:
    """Mean over valid voxels, channels and samples of |distance to the surface| * |probability - target|, in [0, 1].

    The gradient is that of the paper's integral of distance * probability; the constant makes a perfect answer 0. An
    absent structure is beyond reach everywhere: all of it counts 1. Inputs (B, C, D, H, W), `target` 0 or 1.
    """
    distance = surface_distance(target, valid_B1DHW > 0, reach, spacing)
    wrong = (probability - target).abs() * distance * valid_B1DHW
    voxels = valid_B1DHW.flatten(1).sum(1).clamp_min(1) * target.shape[1]
    return (wrong.flatten(1).sum(1) / voxels).mean()


@torch.no_grad()
def surface_distance(
    target: Tensor, known_B1DHW: Tensor, reach: int, spacing: Sequence[float]
) -> Tensor:
    """Distance of each voxel's centre to the nearest known voxel of the other kind, over `reach` voxels of the finest
    axis; 1 from there on. As scipy's `distance_transform_edt` gives for either side.
    """
    finest = min(spacing)
    scaled = [s / finest for s in spacing]
    inside = target > 0.5
    to_outside = _squared_distance(~inside & known_B1DHW, reach, scaled)
    to_inside = _squared_distance(inside, reach, scaled)
    return torch.where(inside, to_outside, to_inside).sqrt().div_(reach).clamp_(max=1)


def _squared_distance(seed: Tensor, reach: int, spacing: Sequence[float]) -> Tensor:
    """Squared distance to the nearest true voxel of `seed`, exact below reach^2 and reach^2 or more elsewhere.

    One axis after the other (https://cs.brown.edu/people/pfelzens/papers/dt-final.pdf), over the shifts within reach.
    """
    limit = float(reach * reach)
    found = torch.where(seed, 0.0, limit)
    for axis, step in zip((-3, -2, -1), spacing, strict=True):
        before, length = found, found.shape[axis]
        found = before.clone()
        for shift in range(1, min(length - 1, int(reach / step)) + 1):
            further = (shift * step) ** 2
            near, far = (
                found.narrow(axis, 0, length - shift),
                before.narrow(axis, shift, length - shift),
            )
            torch.minimum(near, far + further, out=near)
            near, far = (
                found.narrow(axis, shift, length - shift),
                before.narrow(axis, 0, length - shift),
            )
            torch.minimum(near, far + further, out=near)
    return found
