"""The architectures that `model.architecture` can name.

A new U-Net variant is one `Architecture` in `ARCHITECTURES` and its name in the setting
(`config.model.ModelConfig`). Used by `unet` and `topology`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from liverseg_dist.config import ModelConfig
from liverseg_dist.config.registry import find_registered
from liverseg_dist.model.blocks import (
    SLOPE,
    ConvBlock,
    DecoderLevel,
    ResidualBlock,
    Stack,
    build_stack,
)
from liverseg_dist.model.convolution import Triple
from liverseg_dist.model.mednext import MedNeXtDecoderLevel, build_encoder_level

LevelBuilder = Callable[[ModelConfig, int], nn.Module]
"""Builds one level of a network from its settings, with the topology filled in."""
DEFAULT_RATIO = 2


@dataclass(frozen=True)
class Width:
    """Widths and depth of a network."""

    base: int
    """Channels of the first level; each level has twice as many as the one above."""
    cap: int
    """Most channels of a level (nnU-Net: 320 in 3D)."""
    max_levels: int


@dataclass(frozen=True)
class Architecture:
    """What a variant of the U-Net consists of."""

    build_encoder_level: LevelBuilder
    build_decoder_level: LevelBuilder
    preset_blocks: Mapping[str, int | tuple[int, ...]]
    """Encoder blocks per level, by `model.preset`."""
    initialise: Callable[[nn.Module], None] | None
    """Initialises one module; None: as PyTorch does."""
    widths: Mapping[str, Width] = field(default_factory=dict)
    """By `model.preset`, where they differ from `topology.PRESETS`."""
    preset_ratios: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """`model.expansion_ratios` by `model.preset`."""
    largest_kernel: int = 3
    """Most that `model.kernel_edge` may be."""


def _build_conv_encoder_level(kind: type[nn.Module], config: ModelConfig, level: int) -> nn.Module:
    features, kernels, strides, blocks = _read_topology(config)
    channels = features[level - 1] if level else config.in_channels or 1
    width, kernel = features[level], kernels[level]
    if not (config.stem and level == 0):
        return build_stack(
            kind, channels, width, kernel, strides[level], config.norm, blocks[level]
        )
    stage = build_stack(kind, width, width, kernel, strides[level], config.norm, blocks[level])
    # Part of the first level, so that it is frozen, recomputed and sharded with it.
    return Stack(ConvBlock(channels, width, kernel, (1, 1, 1), config.norm), *stage)


def _build_conv_decoder_level(
    decoder_blocks: int | None, config: ModelConfig, level: int
) -> nn.Module:
    """Args: decoder_blocks: convolutions per level; None: as many as in the encoder level."""
    features, kernels, strides, blocks = _read_topology(config)
    return DecoderLevel(
        features[level + 1],
        features[level],
        kernels[level],
        strides[level + 1],
        config.norm,
        decoder_blocks or blocks[level],
        config.upsampling_bias,
    )


def _build_mednext_encoder_level(config: ModelConfig, level: int) -> nn.Module:
    features, kernels, strides, blocks = _read_topology(config)
    ratios = _read_ratios(config)
    above = max(0, level - 1)
    return build_encoder_level(
        features[level - 1] if level else config.in_channels or 1,
        features[level],
        kernels[above : level + 1],
        strides[level],
        ratios[above : level + 1],
        blocks[level],
    )


def _build_mednext_decoder_level(config: ModelConfig, level: int) -> nn.Module:
    features, kernels, strides, blocks = _read_topology(config)
    return MedNeXtDecoderLevel(
        features[level + 1],
        features[level],
        kernels[level],
        strides[level + 1],
        _read_ratios(config)[level],
        blocks[level],
    )


def _read_topology(
    config: ModelConfig,
) -> tuple[tuple[int, ...], tuple[Triple, ...], tuple[Triple, ...], tuple[int, ...]]:
    """Features, kernels, strides and blocks per level."""
    if not (
        config.features
        and config.strides
        and config.kernels
        and isinstance(config.blocks_per_level, tuple)
    ):
        raise ValueError(
            "the topology of the settings is not filled in; call topology.resolve_topology first"
        )
    return config.features, config.kernels, config.strides, config.blocks_per_level


def _read_ratios(config: ModelConfig) -> tuple[int, ...]:
    assert config.features is not None
    ratios = config.expansion_ratios or (DEFAULT_RATIO,)
    # More levels than values: the lowest ones are alike.
    missing = len(config.features) - len(ratios)
    return (*ratios, *([ratios[-1]] * missing))


def _initialise_for_leaky_relu(module: nn.Module) -> None:
    """Initialise with He's rule for the leaky ReLU; biases start at zero."""
    if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
        nn.init.kaiming_normal_(module.weight, a=SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


MEDNEXT_WIDTH = Width(32, 512, 5)
ARCHITECTURES: dict[str, Architecture] = {
    "unet": Architecture(
        build_encoder_level=partial(_build_conv_encoder_level, ConvBlock),
        build_decoder_level=partial(_build_conv_decoder_level, None),
        preset_blocks={"tiny": 2, "S": 2, "B": 2, "M": 2, "L": 2},
        initialise=_initialise_for_leaky_relu,
    ),
    # ResEnc U-Net, https://arxiv.org/abs/2404.09556: one convolution per decoder level.
    "resenc": Architecture(
        build_encoder_level=partial(_build_conv_encoder_level, ResidualBlock),
        build_decoder_level=partial(_build_conv_decoder_level, 1),
        preset_blocks={
            "tiny": (1, 1, 2, 2),
            "S": (1, 2, 3, 4, 4),
            "B": (1, 3, 4, 6, 6),
            "M": (1, 3, 4, 6, 6, 6),
            "L": (1, 3, 4, 6, 6, 6, 6),
        },
        initialise=_initialise_for_leaky_relu,
    ),
    # https://arxiv.org/abs/2303.09975, table 1; tiny is not of the paper.
    "mednext": Architecture(
        build_encoder_level=_build_mednext_encoder_level,
        build_decoder_level=_build_mednext_decoder_level,
        preset_blocks={
            "tiny": 1,
            "S": 2,
            "B": 2,
            "M": (3, 4, 4, 4, 4),
            "L": (3, 4, 8, 8, 8),
        },
        initialise=None,
        widths={
            "tiny": Width(8, 64, 4),
            "S": MEDNEXT_WIDTH,
            "B": MEDNEXT_WIDTH,
            "M": MEDNEXT_WIDTH,
            "L": MEDNEXT_WIDTH,
        },
        preset_ratios={
            "tiny": (2,),
            "S": (2,),
            "B": (2, 3, 4, 4, 4),
            "M": (2, 3, 4, 4, 4),
            "L": (3, 4, 8, 8, 8),
        },
        largest_kernel=5,
    ),
}
"""Architectures by `model.architecture`."""


def find_architecture(config: ModelConfig) -> Architecture:
    """Return the configured architecture.

    Raises:
        UserError: unknown architecture.
    """
    return find_registered(ARCHITECTURES, config.architecture, "model.architecture")
