"""Strides and kernels of each level from the patch and the voxel spacing.

The rule is that of nnU-Net's planner. An axis is halved while its spacing is within a factor of two
of the finest axis that is still being halved and its edge keeps 4 voxels. A kernel is 1 along an
axis until the spacings are comparable (https://www.nature.com/articles/s41592-020-01008-z, "Network
topology").
"""

from collections.abc import Sequence

import numpy as np

from liverseg_dist.config import ModelConfig
from liverseg_dist.config.registry import find_registered
from liverseg_dist.errors import UserError
from liverseg_dist.model.architectures import Architecture, Width, find_architecture

MIN_EDGE = 4
"""Voxels that an edge keeps at the lowest level."""
Triple = tuple[int, int, int]


PRESETS: dict[str, Width] = {
    "tiny": Width(8, 64, 4),
    "S": Width(16, 160, 5),
    "B": Width(32, 320, 5),
    "M": Width(32, 320, 6),
    "L": Width(32, 512, 7),
}
"""Presets by `model.preset`."""


def plan_pooling(
    patch_size: Sequence[int], spacing_mm: Sequence[float], max_levels: int
) -> tuple[list[Triple], list[Triple]]:
    """Return strides and kernels (z, y, x) per level.

    Args:
        patch_size: (z, y, x) in voxels.
        spacing_mm: voxel size (z, y, x).
        max_levels: most levels.

    Returns:
        Strides and kernels, full resolution first; the first stride is (1, 1, 1).
    """
    edge = np.array(patch_size, dtype=float)
    spacing = np.array(spacing_mm, dtype=float)
    strides: list[Triple] = [(1, 1, 1)]
    kernels: list[Triple] = []
    kernel = np.ones(3, dtype=int)
    while True:
        divisible = edge >= 2 * MIN_EDGE
        # A kernel that has become 3 along an axis stays 3 at all lower levels.
        kernel = np.where(spacing / spacing.min() < 2, 3, kernel)
        kernels.append(_to_triple(kernel))
        if not divisible.any() or len(strides) == max_levels:
            break
        finest = spacing[divisible].min()
        halve = divisible & (spacing / finest < 2)
        strides.append(_to_triple(np.where(halve, 2, 1)))
        edge = np.where(halve, np.ceil(edge / 2), edge)
        spacing = np.where(halve, spacing * 2, spacing)
    return strides, kernels


def resolve_topology(
    config: ModelConfig, patch_size: Sequence[int], spacing_mm: Sequence[float]
) -> ModelConfig:
    """Fill in features, strides, kernels and blocks; settings that are given stay.

    Args:
        config: settings `model.*`.
        patch_size: (z, y, x) in voxels.
        spacing_mm: voxel size (z, y, x).

    Raises:
        UserError: the network does not fit the patch.
    """
    architecture = find_architecture(config)
    widths = architecture.widths or PRESETS
    preset = find_registered(widths, config.preset, "model.preset")
    depth = _given_depth(config)
    strides, kernels = plan_pooling(patch_size, spacing_mm, depth or preset.max_levels)
    kernels = _enlarge_kernels(kernels, config, architecture)
    if config.strides is not None:
        strides = list(config.strides)
    if config.kernels is not None:
        kernels = list(config.kernels)
    levels = depth or len(strides)
    if len(strides) < levels or len(kernels) < levels:
        voxels = "x".join(map(str, patch_size))
        raise UserError(
            f"model: {levels} levels do not fit a patch of {voxels} voxels, which allows "
            f"{min(len(strides), len(kernels))}; give fewer features or a larger data.patch_size"
        )
    features = config.features
    if features is None:
        features = tuple(min(preset.base * 2**level, preset.cap) for level in range(levels))
    # After the settings are merged: given strides may need other patch sizes than the preset's.
    _check_patch(strides, patch_size)
    resolved = {
        "features": features,
        "strides": tuple(strides),
        "kernels": tuple(kernels),
        "blocks_per_level": _resolve_blocks(config, levels),
        "expansion_ratios": config.expansion_ratios
        or architecture.preset_ratios.get(config.preset),
    }
    return config.model_copy(update=resolved)


def _enlarge_kernels(
    kernels: list[Triple], config: ModelConfig, architecture: Architecture
) -> list[Triple]:
    """Use `model.kernel_edge` where the planner's kernel spans several voxels."""
    if config.kernel_edge > architecture.largest_kernel:
        raise UserError(
            f"model.kernel_edge={config.kernel_edge}: model.architecture={config.architecture} has "
            f"kernels of {architecture.largest_kernel}; mednext has 3 or 5"
        )
    enlarged = []
    for kernel in kernels:
        z, y, x = (config.kernel_edge if edge > 1 else 1 for edge in kernel)
        enlarged.append((z, y, x))
    return enlarged


def _given_depth(config: ModelConfig) -> int | None:
    """Return the number of levels that the settings fix, or None."""
    for values in (config.features, config.strides, config.kernels):
        if values is not None:
            return len(values)
    return None


def _resolve_blocks(config: ModelConfig, levels: int) -> tuple[int, ...]:
    """Return the number of encoder blocks of each level."""
    blocks = config.blocks_per_level
    if blocks is None:
        blocks = find_architecture(config).preset_blocks[config.preset]
        if isinstance(blocks, tuple):
            blocks = blocks[:levels]
    if isinstance(blocks, int):
        return (blocks,) * levels
    # More levels than the preset has: the lowest ones are alike.
    missing = levels - len(blocks)
    return (*blocks, *([blocks[-1]] * missing))


def size_multiple(strides: Sequence[Triple]) -> Triple:
    """Return the number (z, y, x) of which each edge of an input must be a multiple."""
    return _to_triple(np.prod(np.array(strides), axis=0))


def _check_patch(strides: Sequence[Triple], patch_size: Sequence[int]) -> None:
    multiple = size_multiple(strides)
    fitting = []
    for edge, divisor in zip(patch_size, multiple, strict=True):
        fitting.append(max(1, round(edge / divisor)) * divisor)
    if any(edge % divisor for edge, divisor in zip(patch_size, multiple, strict=True)):
        raise UserError(
            f"data.patch_size = {list(patch_size)}: each edge must be a multiple of "
            f"{list(multiple)} for this network; use for example {fitting}"
        )


def _to_triple(values: np.ndarray) -> Triple:
    z, y, x = (int(v) for v in values)
    return z, y, x
