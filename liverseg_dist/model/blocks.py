"""Convolution blocks of the U-Nets. Shapes: B batch, C channels, D H W = z y x.

Most activations are recomputed in backward instead of being stored (`activation_recompute`).
"""

from collections.abc import Callable
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from liverseg_dist.config.model import NORM_GROUPS
from liverseg_dist.config.registry import find_registered
from liverseg_dist.model.activation_recompute import InstanceNormAct, recompute_fn_through
from liverseg_dist.model.convolution import Conv, Triple, Up

SLOPE = 0.01
"""Of the leaky ReLU for negative inputs, as in nnU-Net."""


class ConvBlock(nn.Module):
    """Convolution, norm, leaky ReLU."""

    conv: Conv
    norm: nn.Module

    def __init__(
        self, in_channels: int, out_channels: int, kernel: Triple, stride: Triple, norm: str
    ) -> None:
        super().__init__()
        self.conv = Conv(in_channels, out_channels, kernel, stride)
        self.norm = build_norm_act(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x))
        return out


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut, as in ResEnc U-Net.

    The shortcut has average pooling and a 1x1x1 projection where resolution or channels change.

    https://arxiv.org/abs/2404.09556
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: Triple, stride: Triple, norm: str
    ) -> None:
        super().__init__()
        self.first = ConvBlock(in_channels, out_channels, kernel, stride, norm)
        self.conv = Conv(out_channels, out_channels, kernel)
        self.norm = build_norm_act(norm, out_channels, slope=1)
        shortcut: list[nn.Module] = []
        if any(s > 1 for s in stride):
            shortcut.append(nn.AvgPool3d(tuple(stride), tuple(stride)))  # type: ignore[arg-type]
        if in_channels != out_channels:
            shortcut += [
                Conv(in_channels, out_channels, (1, 1, 1)),
                build_norm_act(norm, out_channels, slope=1),
            ]
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu_(self.norm(self.conv(self.first(x))) + self.shortcut(x), SLOPE)


class DecoderLevel(nn.Module):
    """Transposed convolution to this level's resolution, then convolutions of it and the skip."""

    def __init__(
        self,
        channels_below: int,
        features: int,
        kernel: Triple,
        stride: Triple,
        norm: str,
        blocks: int,
        upsampling_bias: bool = False,
    ) -> None:
        super().__init__()
        self.up = Up(channels_below, features, stride, upsampling_bias)
        self.convs = build_stack(ConvBlock, 2 * features, features, kernel, (1, 1, 1), norm, blocks)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        # Convolution and norm are called here and not through the block, so that each input can be
        # freed between the two.
        blocks = cast(list[ConvBlock], list(self.convs))
        first, rest = blocks[0], blocks[1:]
        x = first.conv(self.up(x), skip, recompute_fn_through(self.up, x))
        x = first.norm(x)
        for block in rest:
            x = block.conv(x)
            x = block.norm(x)
        return x


def build_norm_act(kind: str, channels: int, slope: float = SLOPE) -> nn.Module:
    """Build a norm over each sample and a leaky ReLU, which is left out if `slope` is 1.

    Raises:
        UserError: unknown norm.
    """
    return find_registered(NORMS, kind, "model.norm")(channels, slope)


class GroupNormAct(nn.GroupNorm):
    """Group norm, then leaky ReLU. Its activations are stored for backward."""

    def __init__(self, channels: int, slope: float) -> None:
        super().__init__(min(NORM_GROUPS, channels), channels)
        self.slope = slope

    def forward(self, input: Tensor) -> Tensor:
        normed = super().forward(input)
        return normed if self.slope == 1 else F.leaky_relu_(normed, self.slope)


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "instance": InstanceNormAct,
    "group": GroupNormAct,
}
"""Norms by `model.norm`, each built from the number of channels and the slope."""


class Stack(nn.Sequential):
    """Blocks in sequence.

    Convolution and norm of a plain block are called here, so that its input is freed in between.
    """

    def forward(self, input: Tensor) -> Tensor:
        x = input
        # Otherwise this name would keep the first input alive.
        del input
        for block in self:
            if isinstance(block, ConvBlock):
                x = block.conv(x)
                x = block.norm(x)
            else:
                x = block(x)
        return x


def build_stack(
    kind: type[nn.Module],
    in_channels: int,
    out_channels: int,
    kernel: Triple,
    stride: Triple,
    norm: str,
    blocks: int,
) -> Stack:
    """Build `blocks` blocks; the first one changes channels and resolution."""
    modules = [kind(in_channels, out_channels, kernel, stride, norm)]
    for _ in range(blocks - 1):
        modules.append(kind(out_channels, out_channels, kernel, (1, 1, 1), norm))
    return Stack(*modules)
