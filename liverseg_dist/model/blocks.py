"""Convolution blocks of the U-Nets. Shapes: B batch, C channels, D H W = z y x."""

from collections.abc import Sequence

from torch import Tensor, nn

SLOPE = 0.01
Triple = Sequence[int]


def make_norm(kind: str, channels: int) -> nn.Module:
    if kind == "group":
        return nn.GroupNorm(min(8, channels), channels)
    return nn.InstanceNorm3d(channels, affine=True)


def conv(inside: int, outside: int, kernel: Triple, stride: Triple = (1, 1, 1)) -> nn.Conv3d:
    """Same-size convolution. No bias: the norm behind it would take it out again."""
    padding = tuple(k // 2 for k in kernel)
    return nn.Conv3d(inside, outside, tuple(kernel), tuple(stride), padding, bias=False)  # type: ignore[arg-type]


class ConvBlock(nn.Sequential):
    """Convolution, norm, leaky ReLU."""

    def __init__(self, inside: int, outside: int, kernel: Triple, stride: Triple, norm: str) -> None:
        super().__init__()
        self.conv = conv(inside, outside, kernel, stride)
        self.norm = make_norm(norm, outside)
        self.act = nn.LeakyReLU(SLOPE, inplace=True)


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut, as in ResEnc U-Net: average pooling and a 1x1x1 projection where needed.

    https://arxiv.org/abs/2404.09556
    """

    def __init__(self, inside: int, outside: int, kernel: Triple, stride: Triple, norm: str) -> None:
        super().__init__()
        self.first = ConvBlock(inside, outside, kernel, stride, norm)
        self.conv = conv(outside, outside, kernel)
        self.norm = make_norm(norm, outside)
        self.act = nn.LeakyReLU(SLOPE, inplace=True)
        shortcut: list[nn.Module] = []
        if any(s > 1 for s in stride):
            shortcut.append(nn.AvgPool3d(tuple(stride), tuple(stride)))  # type: ignore[arg-type]
        if inside != outside:
            shortcut += [conv(inside, outside, (1, 1, 1)), make_norm(norm, outside)]
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(self.first(x))) + self.shortcut(x))


def stack(
    kind: type[nn.Module], inside: int, outside: int, kernel: Triple, stride: Triple, norm: str, blocks: int
) -> nn.Sequential:
    """`blocks` blocks; the first one changes channels and resolution."""
    first = kind(inside, outside, kernel, stride, norm)
    return nn.Sequential(first, *(kind(outside, outside, kernel, (1, 1, 1), norm) for _ in range(blocks - 1)))
