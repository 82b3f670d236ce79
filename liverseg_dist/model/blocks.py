"""Convolution blocks of the U-Nets. Shapes: B batch, C channels, D H W = z y x.

Their activations are rebuilt in backward instead of being kept (`rebuild`).
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from liverseg_dist.config.model import NORM_GROUPS
from liverseg_dist.model.activation_recompute import InstanceNormAct, recompute_fn_through
from liverseg_dist.model.convolution import Conv, Triple, Up

SLOPE = 0.01


class ConvBlock(nn.Module):
    """Convolution, norm, leaky ReLU."""

    conv: Conv
    norm: nn.Module

    def __init__(
        self, inside: int, outside: int, kernel: Triple, stride: Triple, norm: str
    ) -> None:
        super().__init__()
        self.conv = Conv(inside, outside, kernel, stride)
        self.norm = norm_act(norm, outside)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x))
        return out


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut, as in ResEnc U-Net: average pooling and a 1x1x1 projection where needed.

    https://arxiv.org/abs/2404.09556
    """

    def __init__(
        self, inside: int, outside: int, kernel: Triple, stride: Triple, norm: str
    ) -> None:
        super().__init__()
        self.first = ConvBlock(inside, outside, kernel, stride, norm)
        self.conv = Conv(outside, outside, kernel)
        self.norm = norm_act(norm, outside, slope=1)
        shortcut: list[nn.Module] = []
        if any(s > 1 for s in stride):
            shortcut.append(nn.AvgPool3d(tuple(stride), tuple(stride)))  # type: ignore[arg-type]
        if inside != outside:
            shortcut += [Conv(inside, outside, (1, 1, 1)), norm_act(norm, outside, slope=1)]
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu_(self.norm(self.conv(self.first(x))) + self.shortcut(x), SLOPE)


class DecoderLevel(nn.Module):
    """Transposed convolution to this level's resolution, the skip beside it, then convolutions."""

    def __init__(
        self,
        below: int,
        features: int,
        kernel: Triple,
        stride: Triple,
        norm: str,
        blocks: int,
        upsampling_bias: bool = False,
    ) -> None:
        super().__init__()
        self.up = Up(below, features, stride, upsampling_bias)
        self.convs = build_stack(ConvBlock, 2 * features, features, kernel, (1, 1, 1), norm, blocks)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        blocks = cast(list[ConvBlock], list(self.convs))
        first, rest = blocks[0], blocks[1:]
        x = first.conv(self.up(x), skip, recompute_fn_through(self.up, x))
        x = first.norm(x)
        for block in rest:
            x = block.conv(x)
            x = block.norm(x)
        return x


def norm_act(kind: str, channels: int, slope: float = SLOPE) -> nn.Module:
    """Norm over each sample, then leaky ReLU unless `slope` is 1."""
    return InstanceNormAct(channels, slope) if kind == "instance" else GroupNormAct(channels, slope)


class GroupNormAct(nn.GroupNorm):
    """Group norm, then leaky ReLU. Its activations are kept."""

    def __init__(self, channels: int, slope: float) -> None:
        super().__init__(min(NORM_GROUPS, channels), channels)
        self.slope = slope

    def forward(self, input: Tensor) -> Tensor:
        normed = super().forward(input)
        return normed if self.slope == 1 else F.leaky_relu_(normed, self.slope)


class Stack(nn.Sequential):
    """Blocks in a row. A plain block's convolution and norm are called here, so that its input is let go in between."""

    def forward(self, input: Tensor) -> Tensor:
        x = input
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
    inside: int,
    outside: int,
    kernel: Triple,
    stride: Triple,
    norm: str,
    blocks: int,
) -> Stack:
    """`blocks` blocks; the first one changes channels and resolution."""
    first = kind(inside, outside, kernel, stride, norm)
    return Stack(
        first, *(kind(outside, outside, kernel, (1, 1, 1), norm) for _ in range(blocks - 1))
    )
