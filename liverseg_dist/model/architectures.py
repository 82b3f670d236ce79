"""The architectures that `model.architecture` can name.

A new U-Net variant is one `Architecture` in `ARCHITECTURES` and its name in the setting
(`config.model.ModelConfig`). Used by `unet` and `topology`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from liverseg_dist.config import ModelConfig
from liverseg_dist.config.registry import find_registered
from liverseg_dist.model.blocks import ConvBlock, ResidualBlock


@dataclass(frozen=True)
class Architecture:
    """What a variant of the U-Net consists of."""

    encoder_block: type[nn.Module]
    decoder_blocks: int | None
    """Convolutions in each decoder level; None: as many as in the encoder level."""
    preset_blocks: Mapping[str, int | tuple[int, ...]]
    """Encoder blocks per level, by `model.preset`."""


ARCHITECTURES: dict[str, Architecture] = {
    "unet": Architecture(
        encoder_block=ConvBlock,
        decoder_blocks=None,
        preset_blocks={"tiny": 2, "S": 2, "M": 2, "L": 2},
    ),
    # ResEnc U-Net, https://arxiv.org/abs/2404.09556: one convolution per decoder level.
    "resenc": Architecture(
        encoder_block=ResidualBlock,
        decoder_blocks=1,
        preset_blocks={
            "tiny": (1, 1, 2, 2),
            "S": (1, 2, 3, 4, 4),
            "M": (1, 3, 4, 6, 6, 6),
            "L": (1, 3, 4, 6, 6, 6, 6),
        },
    ),
}
"""Architectures by `model.architecture`."""


def find_architecture(config: ModelConfig) -> Architecture:
    """Return the configured architecture.

    Raises:
        UserError: unknown architecture.
    """
    return find_registered(ARCHITECTURES, config.architecture, "model.architecture")
