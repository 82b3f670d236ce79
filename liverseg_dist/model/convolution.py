"""The U-Nets' convolutions: same results as PyTorch's, but their inputs are rebuilt in backward where they can be
(`rebuild`), and on CPUs oneDNN is used where PyTorch would pick something several times slower.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liverseg_dist.model.activation_recompute import Recipe, recompute_fn, recompute_in_backward

Triple = Sequence[int]
SMALL = 20_480
"""PyTorch leaves oneDNN aside for a single sample of channels * depth * height up to this, whatever its width
(`use_mkldnn` in https://github.com/pytorch/pytorch/blob/v2.8.0/aten/src/ATen/native/Convolution.cpp)."""


class Conv(nn.Conv3d):
    """Same-size convolution. No bias: the norm behind it would take it out again."""

    def __init__(
        self, inside: int, outside: int, kernel: Triple, stride: Triple = (1, 1, 1)
    ) -> None:
        padding = tuple(k // 2 for k in kernel)
        super().__init__(inside, outside, tuple(kernel), tuple(stride), padding, bias=False)  # type: ignore[arg-type]

    def forward(
        self, input: Tensor, beside: Tensor | None = None, made_by: Recipe | None = None
    ) -> Tensor:
        """Convolves `input`, or the concatenation of `input` and `beside` as a sum of two: nothing is copied together.

        `made_by` makes `input` again in backward.
        """
        halved = self._better_halved(input)
        if beside is None:
            out = self._convolve(input, self.weight, made_by or recompute_fn(input), halved)
        else:
            ours, theirs = self.weight.split([input.shape[1], beside.shape[1]], dim=1)
            out = self._convolve(input, ours, made_by or recompute_fn(input), halved)
            out = out.add_(self._convolve(beside, theirs, recompute_fn(beside), halved))
        return out.transpose(0, 1).flatten(1, 2).unsqueeze(0) if halved else out

    def _convolve(self, x: Tensor, weight: Tensor, made_by: Recipe | None, halved: bool) -> Tensor:
        if not halved:
            with recompute_in_backward(x, recipes=[made_by]):
                return F.conv3d(x, weight, None, self.stride, self.padding)
        again = None if made_by is None else lambda: self._halves(made_by())
        x = self._halves(x)
        with recompute_in_backward(x, recipes=[again]):
            return F.conv3d(x, weight, None, self.stride, (0, *self.padding[1:]))

    def _better_halved(self, x: Tensor) -> bool:
        """Whether a sample goes as a batch of two halves, so that oneDNN takes it."""
        alone = (
            len(x) == 1
            and x.device.type == "cpu"
            and x.dtype == torch.float32
            and not torch.compiler.is_compiling()
        )
        small = x.shape[1] * x.shape[2] * x.shape[3] <= SMALL and self.kernel_size != (1, 1, 1)
        return alone and small and x.shape[2] % (2 * self.stride[0]) == 0

    def _halves(self, x: Tensor) -> Tensor:
        """Front and back half as a batch, each with the border that the convolution needs along z."""
        padding, step = int(self.padding[0]), x.shape[2] // 2
        padded = F.pad(x, (0, 0, 0, 0, padding, padding))
        length = step - self.stride[0] + self.kernel_size[0]
        return padded.unfold(2, length, step).squeeze(0).permute(1, 0, 4, 2, 3)


class Up(nn.ConvTranspose3d):
    """Transposed convolution whose kernel is its stride."""

    def __init__(self, inside: int, outside: int, stride: Triple, bias: bool = False) -> None:
        super().__init__(inside, outside, tuple(stride), tuple(stride), bias=bias)  # type: ignore[arg-type]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        with recompute_in_backward(input):
            return super().forward(input, output_size)


class Head(nn.Conv3d):
    """1x1x1 convolution to logits, as a matrix product: oneDNN's is 8 times slower on channels-last input."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(inside, outside, 1)

    def forward(self, input: Tensor) -> Tensor:
        with recompute_in_backward(input):
            if input.device.type != "cpu" or input.is_contiguous():
                return super().forward(input)
            logits_BDHWC = F.linear(input.permute(0, 2, 3, 4, 1), self.weight.flatten(1), self.bias)
            return logits_BDHWC.permute(0, 4, 1, 2, 3)
