"""Boundary loss: the cost of a wrong voxel is its distance to the true surface.

https://arxiv.org/abs/1812.07032, with distances cut off at a number of voxels. With the cut-off the
distance is exact and computed by shifts on the training device, no label returns to the CPU, and a
far error does not outweigh all others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def boundary_term(
    probability: Tensor, target: Tensor, valid_B1DHW: Tensor, reach: int, spacing: Sequence[float]
) -> Tensor:
    """Return the mean of |distance to the surface| * |probability - target|, in [0, 1].

    The mean is over valid voxels, channels and samples. The gradient is that of the paper's
    integral of distance * probability; the constant makes a perfect prediction 0. A structure that
    is absent is beyond the cut-off everywhere: every predicted voxel of it costs 1.

    Args:
        probability: (B, C, D, H, W) in [0, 1].
        target: (B, C, D, H, W), 0 or 1.
        valid_B1DHW: 1 for voxels with a label, else 0.
        reach: cut-off in voxels of the finest axis.
        spacing: voxel size (z, y, x) in mm.
    """
    distance = surface_distance(target, valid_B1DHW > 0, reach, spacing)
    wrong = (probability - target).abs() * distance * valid_B1DHW
    voxels = valid_B1DHW.flatten(1).sum(1).clamp_min(1) * target.shape[1]
    return (wrong.flatten(1).sum(1) / voxels).mean()


@torch.no_grad()
def surface_distance(
    target: Tensor, known_B1DHW: Tensor, reach: int, spacing: Sequence[float]
) -> Tensor:
    """Return the distance of each voxel's centre to the nearest known voxel of the other kind.

    The unit is `reach` voxels of the finest axis; farther voxels have the distance 1. Inside and
    outside the structure the values are those of scipy's `distance_transform_edt`.
    """
    finest = min(spacing)
    relative_spacing = [size / finest for size in spacing]
    inside = target > 0.5
    # Unknown voxels are no surface: neither inside nor outside.
    to_outside = _squared_distance(~inside & known_B1DHW, reach, relative_spacing)
    to_inside = _squared_distance(inside, reach, relative_spacing)
    return torch.where(inside, to_outside, to_inside).sqrt().div_(reach).clamp_(max=1)


def _squared_distance(seed: Tensor, reach: int, spacing: Sequence[float]) -> Tensor:
    """Return the squared distance to the nearest true voxel of `seed`.

    It is exact below reach^2; elsewhere it is reach^2 or more. The axes are processed one after the
    other (https://cs.brown.edu/people/pfelzens/papers/dt-final.pdf), over all shifts within reach.
    """
    limit = float(reach * reach)
    result = torch.where(seed, 0.0, limit)
    for axis, step in zip((-3, -2, -1), spacing, strict=True):
        before, length = result, result.shape[axis]
        result = before.clone()
        for shift in range(1, min(length - 1, int(reach / step)) + 1):
            squared_shift = (shift * step) ** 2
            count = length - shift
            # Neighbours `shift` voxels up, then down the axis.
            for target_start, source_start in ((0, shift), (shift, 0)):
                target = result.narrow(axis, target_start, count)
                source = before.narrow(axis, source_start, count)
                torch.minimum(target, source + squared_shift, out=target)
    return result
