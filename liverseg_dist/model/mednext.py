"""The blocks of MedNeXt: depthwise convolutions of large kernels between 1x1x1 convolutions.

A block is a depthwise convolution, a norm of each channel, and two 1x1x1 convolutions that expand
the channels and reduce them again. Going down and up are such blocks with a stride and a residual
path of their own; the decoder adds the skip. https://arxiv.org/abs/2303.09975; tested against
`monai.networks.nets.MedNeXt`. Here strides may differ between axes, and edges of kernels too.
Used by `architectures`.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from liverseg_dist.model.convolution import Triple

UNIT_STRIDE = (1, 1, 1)


class MedNeXtBlock(nn.Module):
    """One block, with a residual connection if it keeps channels and resolution.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel: edges of the depthwise convolution (z, y, x), odd.
        ratio: channels between the 1x1x1 convolutions, per input channel.
        stride: of the depthwise convolution.
        upsamples: whether the stride enlarges the image instead of reducing it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Triple,
        ratio: int,
        stride: Triple = UNIT_STRIDE,
        upsamples: bool = False,
    ) -> None:
        super().__init__()
        convolution = nn.ConvTranspose3d if upsamples else nn.Conv3d
        padding = tuple(edge // 2 for edge in kernel)
        self.depthwise = convolution(
            in_channels,
            in_channels,
            tuple(kernel),  # type: ignore[arg-type]
            tuple(stride),  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            groups=in_channels,
        )
        self.norm = nn.GroupNorm(in_channels, in_channels)
        self.expand = nn.Conv3d(in_channels, ratio * in_channels, 1)
        self.reduce = nn.Conv3d(ratio * in_channels, out_channels, 1)
        self.shortcut: nn.Module = nn.Identity()
        changes = upsamples or in_channels != out_channels or any(edge > 1 for edge in stride)
        if changes:
            self.shortcut = convolution(in_channels, out_channels, 1, tuple(stride))  # type: ignore[arg-type]
        # A transposed convolution ends stride - 1 voxels early; MedNeXt pads these at the start.
        self.front = tuple(edge - 1 for edge in stride) if upsamples else (0, 0, 0)

    def forward(self, x: Tensor) -> Tensor:
        out = self.reduce(F.gelu(self.expand(self.norm(self.depthwise(x)))))
        return self._pad(out) + self._pad(self.shortcut(x))

    def _pad(self, x: Tensor) -> Tensor:
        if not any(self.front):
            return x
        z, y, x_edge = self.front
        return F.pad(x, (x_edge, 0, y, 0, z, 0))


class MedNeXtDecoderLevel(nn.Module):
    """A block to this level's resolution, the sum with the skip, then further blocks."""

    def __init__(
        self,
        channels_below: int,
        features: int,
        kernel: Triple,
        stride: Triple,
        ratio: int,
        blocks: int,
    ) -> None:
        super().__init__()
        self.up = MedNeXtBlock(channels_below, features, kernel, ratio, stride, upsamples=True)
        self.blocks = build_blocks(features, kernel, ratio, blocks)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        out: Tensor = self.blocks(self.up(x) + skip)
        return out


def build_encoder_level(
    in_channels: int,
    features: int,
    kernels: Sequence[Triple],
    stride: Triple,
    ratios: Sequence[int],
    blocks: int,
) -> nn.Sequential:
    """Build a level of the encoder: a way in, then blocks.

    Args:
        in_channels: channels of the level above, or of the image.
        features: channels of this level.
        kernels: kernels of the level above and of this one; one entry for the first level, whose
            way in is a 1x1x1 convolution.
        stride: on entering the level.
        ratios: expansion of the level above and of this one; one entry for the first level.
        blocks: number of blocks.
    """
    first: nn.Module
    if len(kernels) == 1:
        first = nn.Conv3d(in_channels, features, 1)
    else:
        first = MedNeXtBlock(in_channels, features, kernels[0], ratios[0], stride)
    return nn.Sequential(first, *build_blocks(features, kernels[-1], ratios[-1], blocks))


def build_blocks(features: int, kernel: Triple, ratio: int, count: int) -> nn.Sequential:
    """Build blocks that keep channels and resolution."""
    blocks = [MedNeXtBlock(features, features, kernel, ratio) for _ in range(count)]
    return nn.Sequential(*blocks)
