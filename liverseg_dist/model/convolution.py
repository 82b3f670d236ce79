"""The convolutions of the U-Nets.

Their results are those of PyTorch's, with two differences: inputs are recomputed in backward where
possible (`activation_recompute`), and on CPUs oneDNN is used where PyTorch would choose an
implementation that is several times slower.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liverseg_dist.model.activation_recompute import Recompute, recompute_fn, recompute_in_backward

Triple = Sequence[int]
SMALL_INPUT = 20_480
"""PyTorch does not use oneDNN for one sample with channels * depth * height up to this number.

The width has no influence (`use_mkldnn` in
https://github.com/pytorch/pytorch/blob/v2.8.0/aten/src/ATen/native/Convolution.cpp).
"""


class Conv(nn.Conv3d):
    """Convolution that keeps the size. It has no bias, which the norm after it would remove."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: Triple, stride: Triple = (1, 1, 1)
    ) -> None:
        padding = tuple(k // 2 for k in kernel)
        super().__init__(
            in_channels,
            out_channels,
            tuple(kernel),  # type: ignore[arg-type]
            tuple(stride),  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            bias=False,
        )

    def forward(
        self, input: Tensor, skip: Tensor | None = None, recompute: Recompute | None = None
    ) -> Tensor:
        """Convolve `input`, or the concatenation of `input` and `skip`.

        The convolution of a concatenation is a sum of two convolutions, without a copy of both.

        Args:
            input: (B, C, D, H, W).
            skip: further channels, or None.
            recompute: recomputes `input` in backward; None: if possible, it is found from `input`.
        """
        halved = self._is_faster_in_halves(input)
        if skip is None:
            out = self._convolve(input, self.weight, recompute or recompute_fn(input), halved)
        else:
            first, second = self.weight.split([input.shape[1], skip.shape[1]], dim=1)
            out = self._convolve(input, first, recompute or recompute_fn(input), halved)
            out = out.add_(self._convolve(skip, second, recompute_fn(skip), halved))
        return out.transpose(0, 1).flatten(1, 2).unsqueeze(0) if halved else out

    def _convolve(
        self, x: Tensor, weight: Tensor, recompute: Recompute | None, halved: bool
    ) -> Tensor:
        if not halved:
            with recompute_in_backward(x, functions=[recompute]):
                return F.conv3d(x, weight, None, self.stride, self.padding)
        recompute_halves = None
        if recompute is not None:
            full_recompute = recompute

            def recompute_halves() -> Tensor:
                return self._split_in_halves(full_recompute())

        x = self._split_in_halves(x)
        with recompute_in_backward(x, functions=[recompute_halves]):
            return F.conv3d(x, weight, None, self.stride, (0, *self.padding[1:]))

    def _is_faster_in_halves(self, x: Tensor) -> bool:
        """Whether one sample is computed as a batch of two halves, so that oneDNN is used."""
        alone = (
            len(x) == 1
            and x.device.type == "cpu"
            and x.dtype == torch.float32
            and not torch.compiler.is_compiling()
        )
        small = x.shape[1] * x.shape[2] * x.shape[3] <= SMALL_INPUT and self.kernel_size != (
            1,
            1,
            1,
        )
        return alone and small and x.shape[2] % (2 * self.stride[0]) == 0

    def _split_in_halves(self, x: Tensor) -> Tensor:
        """Return the two halves along z as a batch, each with the border that the kernel needs."""
        padding, step = int(self.padding[0]), x.shape[2] // 2
        padded = F.pad(x, (0, 0, 0, 0, padding, padding))
        length = step - self.stride[0] + self.kernel_size[0]
        return padded.unfold(2, length, step).squeeze(0).permute(1, 0, 4, 2, 3)


class Up(nn.ConvTranspose3d):
    """Transposed convolution whose kernel is its stride."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: Triple, bias: bool = False
    ) -> None:
        # The kernel size is the stride.
        kernel = (stride[0], stride[1], stride[2])
        super().__init__(in_channels, out_channels, kernel, kernel, bias=bias)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        with recompute_in_backward(input):
            return super().forward(input, output_size)


class Head(nn.Conv3d):
    """1x1x1 convolution to logits.

    On channels-last input it is a matrix product: oneDNN's convolution is 8 times slower there.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        with recompute_in_backward(input):
            if input.device.type != "cpu" or input.is_contiguous():
                return super().forward(input)
            logits_BDHWC = F.linear(input.permute(0, 2, 3, 4, 1), self.weight.flatten(1), self.bias)
            return logits_BDHWC.permute(0, 4, 1, 2, 3)
