"""Strides and kernels of each level from the patch and the voxel spacing, by the rule of nnU-Net's planner.

An axis is halved while its spacing is within a factor of two of the finest axis still being halved and its edge keeps 4
voxels; a kernel is 1 along an axis until the spacings have become comparable
(https://www.nature.com/articles/s41592-020-01008-z, "Network topology").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from liverseg_dist.config import ModelConfig
from liverseg_dist.errors import UserError

SMALLEST_EDGE = 4
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Preset:
    """Width of the first level, its cap (as nnU-Net: 320 in 3D), depth limit, blocks per level."""

    base: int
    cap: int
    max_levels: int
    unet_blocks: int = 2
    resenc_blocks: tuple[int, ...] = (1, 3, 4, 6, 6, 6)


PRESETS = {
    "tiny": Preset(8, 64, 4, resenc_blocks=(1, 1, 2, 2)),
    "S": Preset(16, 160, 5, resenc_blocks=(1, 2, 3, 4, 4)),
    "M": Preset(32, 320, 6),
    "L": Preset(32, 512, 7, resenc_blocks=(1, 3, 4, 6, 6, 6, 6)),
}


def plan_pooling(
    patch_size: Sequence[int], spacing_mm: Sequence[float], max_levels: int
) -> tuple[list[Triple], list[Triple]]:
    """Strides and kernels (z, y, x) per level, full resolution first (its stride is 1, 1, 1)."""
    edge = np.array(patch_size, dtype=float)
    spacing = np.array(spacing_mm, dtype=float)
    strides: list[Triple] = [(1, 1, 1)]
    kernels: list[Triple] = []
    kernel = np.ones(3, dtype=int)
    while True:
        divisible = edge >= 2 * SMALLEST_EDGE
        kernel = np.where(spacing / spacing.min() < 2, 3, kernel)
        kernels.append(_triple(kernel))
        if not divisible.any() or len(strides) == max_levels:
            break
        finest = spacing[divisible].min()
        halve = divisible & (spacing / finest < 2)
        strides.append(_triple(np.where(halve, 2, 1)))
        edge = np.where(halve, np.ceil(edge / 2), edge)
        spacing = np.where(halve, spacing * 2, spacing)
    return strides, kernels


def resolve_topology(
    config: ModelConfig, patch_size: Sequence[int], spacing_mm: Sequence[float]
) -> ModelConfig:
    """The config with features, strides, kernels and blocks filled in; what is given stays. Raises `UserError`."""
    preset = PRESETS[config.preset]
    depth = next(
        (len(v) for v in (config.features, config.strides, config.kernels) if v is not None), None
    )
    strides, kernels = plan_pooling(patch_size, spacing_mm, depth or preset.max_levels)
    if config.strides is not None:
        strides = list(config.strides)
    if config.kernels is not None:
        kernels = list(config.kernels)
    levels = depth or len(strides)
    if len(strides) < levels or len(kernels) < levels:
        raise UserError(
            f"model: {levels} levels do not fit a patch of {'x'.join(map(str, patch_size))} voxels, which allows "
            f"{min(len(strides), len(kernels))}; give fewer features or a larger data.patch_size"
        )
    features = config.features or tuple(
        min(preset.base * 2**level, preset.cap) for level in range(levels)
    )
    blocks = config.blocks_per_level
    if blocks is None:
        blocks = (
            preset.unet_blocks if config.architecture == "unet" else preset.resenc_blocks[:levels]
        )
    if isinstance(blocks, int):
        blocks = (blocks,) * levels
    if len(blocks) < levels:
        blocks = (*blocks, *([blocks[-1]] * (levels - len(blocks))))
    _check_patch(strides, patch_size)
    resolved = {
        "features": features,
        "strides": tuple(strides),
        "kernels": tuple(kernels),
        "blocks_per_level": blocks,
    }
    return config.model_copy(update=resolved)


def size_multiple(strides: Sequence[Triple]) -> Triple:
    """What each edge of an input must be a multiple of."""
    return _triple(np.prod(np.array(strides), axis=0))


def _check_patch(strides: Sequence[Triple], patch_size: Sequence[int]) -> None:
    multiple = size_multiple(strides)
    if any(edge % m for edge, m in zip(patch_size, multiple, strict=True)):
        fitting = [
            max(1, round(edge / m)) * m for edge, m in zip(patch_size, multiple, strict=True)
        ]
        raise UserError(
            f"data.patch_size = {list(patch_size)}: each edge must be a multiple of {list(multiple)} for this network; "
            f"{fitting} would do"
        )


def _triple(values: np.ndarray) -> Triple:
    z, y, x = (int(v) for v in values)
    return z, y, x
