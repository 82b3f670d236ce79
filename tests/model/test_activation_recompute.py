"""Recomputed activations and fast CPU convolutions against PyTorch's own layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from liverseg_dist.model.activation_recompute import InstanceNormAct
from liverseg_dist.model.blocks import ConvBlock
from liverseg_dist.model.convolution import SMALL_INPUT, Conv, Head, Up

FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last_3d}


def gradients(module: nn.Module, out: Tensor, *inputs: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return list(torch.autograd.grad((out * weight).sum(), [*inputs, *module.parameters()]))


def assert_same(result: list[Tensor], reference: list[Tensor]) -> None:
    for a, b in zip(result, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("slope", [0.01, 1.0])
def test_norm_and_activation_equal_torch(memory: str, samples: int, slope: float) -> None:
    torch.manual_seed(0)
    result, reference = InstanceNormAct(6, slope), nn.InstanceNorm3d(6, affine=True)
    with torch.no_grad():
        result.weight.copy_(
            torch.tensor([1.0, -2.0, 0.5, 0.0, 1e-4, 3.0])
        )  # also zero: no inversion is needed
        result.bias.normal_()
    reference.load_state_dict(result.state_dict())
    x = (
        (torch.randn(samples, 6, 4, 6, 5) * 3 + 1)
        .to(memory_format=FORMATS[memory])
        .requires_grad_()
    )
    a, b = result(x), F.leaky_relu(reference(x), slope)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert a.is_contiguous(memory_format=FORMATS[memory])
    assert_same(gradients(result, a, x), gradients(reference, b, x))


def test_norm_and_activation_pass_gradcheck() -> None:
    torch.manual_seed(0)
    layer = InstanceNormAct(2, 0.01).double()
    x = torch.randn(2, 2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w, b: _functional(layer, x, w, b), (x, layer.weight, layer.bias)
    )


def _functional(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize(
    ("kernel", "stride", "shape"),
    [
        ((3, 3, 3), (1, 1, 1), (1, 4, 8, 6, 5)),  # small: computed in two halves
        ((3, 3, 3), (2, 2, 2), (1, 4, 8, 6, 6)),
        ((1, 3, 3), (1, 2, 2), (1, 4, 6, 6, 6)),
        ((3, 3, 3), (2, 1, 1), (1, 4, 6, 5, 5)),  # three output planes: no halves
        ((3, 3, 3), (1, 1, 1), (2, 4, 8, 6, 5)),
        (
            (3, 3, 3),
            (1, 1, 1),
            (1, 4, 64, SMALL_INPUT // 256 + 1, 3),
        ),  # large enough for oneDNN by itself
    ],
)
def test_convolution_of_input_and_of_input_with_skip(
    memory: str, kernel: tuple, stride: tuple, shape: tuple
) -> None:
    torch.manual_seed(0)
    layer = Conv(shape[1], 5, kernel, stride).to(memory_format=FORMATS[memory])
    x, y = (torch.randn(shape).to(memory_format=FORMATS[memory]).requires_grad_() for _ in range(2))
    padding = tuple(k // 2 for k in kernel)
    result, reference = layer(x), F.conv3d(x, layer.weight, None, stride, padding)
    torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5)
    assert_same(gradients(layer, result, x), gradients(layer, reference, x))

    wide = Conv(2 * shape[1], 5, kernel, stride).to(memory_format=FORMATS[memory])
    result, reference = (
        wide(x, y),
        F.conv3d(torch.cat([x, y], 1), wide.weight, None, stride, padding),
    )
    torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5)
    assert_same(gradients(wide, result, x, y), gradients(wide, reference, x, y))


@pytest.mark.parametrize("memory", FORMATS)
def test_up_and_head_equal_torch(memory: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 4, 5).to(memory_format=FORMATS[memory]).requires_grad_()
    up, head = Up(4, 3, (1, 2, 2)), Head(4, 3)
    for result, layer, reference in (
        (up(x), up, F.conv_transpose3d(x, up.weight, None, (1, 2, 2))),
        (head(x), head, F.conv3d(x, head.weight, head.bias)),
    ):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5)
        assert_same(gradients(layer, result, x), gradients(layer, reference, x))


class Plain(nn.Module):
    """ConvBlocks' parameters, run by PyTorch's own functions."""

    def __init__(self, blocks: nn.Sequential) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.conv3d(x, block.conv.weight, None, block.conv.stride, block.conv.padding)
            x = F.leaky_relu(
                F.instance_norm(x, weight=block.norm.weight, bias=block.norm.bias, eps=1e-5), 0.01
            )
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_sequence_of_blocks_in_each_precision(dtype: torch.dtype, recompute: bool) -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(
        ConvBlock(3, 4, (3, 3, 3), (1, 1, 1), "instance"),
        ConvBlock(4, 4, (3, 3, 3), (1, 1, 1), "instance"),
    )
    plain = Plain(copy.deepcopy(blocks))
    x = torch.randn(2, 3, 6, 6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        result = checkpoint(blocks, x, use_reentrant=False) if recompute else blocks(x)
        reference = plain(x)
    assert result.dtype == reference.dtype == dtype
    loose = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(result, reference, rtol=loose, atol=loose)
    for a, b in zip(
        gradients(blocks, result.float(), x), gradients(plain, reference.float(), x), strict=True
    ):
        assert float((a - b).norm() / b.norm()) < loose


def test_second_backward_over_the_same_graph() -> None:
    block = nn.Sequential(
        ConvBlock(1, 4, (3, 3, 3), (1, 1, 1), "instance"),
        ConvBlock(4, 4, (3, 3, 3), (1, 1, 1), "instance"),
    )
    out = block(torch.randn(1, 1, 4, 4, 4)).square().sum()
    first = torch.autograd.grad(out, list(block.parameters()), retain_graph=True)
    second = torch.autograd.grad(out, list(block.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
