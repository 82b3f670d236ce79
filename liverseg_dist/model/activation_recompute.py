"""Activations that backward builds anew instead of keeping them: the same mathematics, half the memory.

A convolution keeps its input for its weights' gradient, and the norm before it keeps its own input, although the one
follows from the other by a cheap pass. Here instance norm and leaky ReLU are one function that keeps the norm's input;
convolutions behind it keep only how to make their input again. Unlike inverting the activation
(https://arxiv.org/abs/1712.02616) this holds for any scale, zero too, and in bf16.

What is kept goes through `save_for_backward`, so this lives together with `torch.utils.checkpoint`, offloading hooks,
FSDP and ZeRO: no parameter is touched in backward but through its own module. Under `torch.compile` the plain
operations are used; its partitioner decides by itself what to keep.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

Recipe = Callable[[], Tensor]
ops = torch.ops.aten


class InstanceNormAct(nn.InstanceNorm3d):
    """Affine instance norm, then leaky ReLU of `slope` (1: none). Names and values as `nn.InstanceNorm3d`'s."""

    def __init__(self, channels: int, slope: float) -> None:
        super().__init__(channels, affine=True)
        self.slope = slope

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            normed = F.instance_norm(input, weight=self.weight, bias=self.bias, eps=self.eps)
            return normed if self.slope == 1 else F.leaky_relu(normed, self.slope)
        result: Tensor = _NormAct.apply(input, self.weight, self.bias, self.eps, self.slope)
        return result


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float
    ) -> Tensor:
        x = _dense(x)
        out, mean, inverse_std = _norm(x, weight, bias, eps)
        # Copies, so that rebuilding does not depend on parameters that a sharding strategy has put away by then.
        ctx.save_for_backward(x, weight.detach().clone(), bias.detach().clone(), mean, inverse_std)
        ctx.eps, ctx.slope, ctx.opened = eps, slope, None
        return out if slope == 1 else F.leaky_relu_(out, slope)

    @staticmethod
    def rebuild(ctx: Any) -> Tensor:
        """The output again, to the bit: made by the same operations."""
        if ctx.opened is None:  # checkpointing hands out each kept tensor once
            ctx.opened = ctx.saved_tensors
        x, weight, bias, *_ = ctx.opened
        out, *_ = _norm(x, weight, bias, ctx.eps)
        return out if ctx.slope == 1 else F.leaky_relu_(out, ctx.slope)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse_std = ctx.opened or ctx.saved_tensors
        ctx.opened = None
        if (
            ctx.slope != 1
        ):  # the sign before the activation tells its slope; its memory takes the gradient
            normed = _normalise(x, weight, bias, mean, inverse_std, ctx.eps)
            grad = ops.leaky_relu_backward.grad_input(
                _like(grad, normed), normed, ctx.slope, False, grad_input=normed
            )
        gradients = _norm_backward(_like(grad, x), x, weight, mean, inverse_std, ctx.eps)
        return (*gradients, None, None)


def recompute_fn(x: Tensor) -> Recipe | None:
    """How to make `x` again in backward, or None where it has to be kept."""
    if torch.compiler.is_compiling():
        return None
    node: Any = x.grad_fn
    if not isinstance(node, _NormAct._backward_cls) or getattr(node, "opaque", False):
        return None

    @torch.no_grad()
    def make() -> Tensor:
        return _NormAct.rebuild(node)

    return make


def keep_storage(x: Tensor) -> Tensor:
    """Marks `x` as not to be rebuilt by who uses it: its own parts are not kept (a checkpointed stage's output)."""
    if recompute_fn(x) is not None:
        node: Any = x.grad_fn
        node.opaque = True
    return x


def recompute_fn_through(module: nn.Module, x: Tensor) -> Recipe | None:
    """How to make `module(x)` again; called as a module, so that sharding gathers its weights.

    Only for a module that keeps `x` for its own backward, so that nothing is held for longer.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    make = recompute_fn(x) or partial(Tensor.detach, x.detach())
    device = x.device.type
    known = torch.amp.is_autocast_available(device)  # not for tensors without memory (planning)
    enabled, dtype = (
        known and torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device) if known else None,
    )

    @torch.no_grad()
    def through() -> Tensor:
        with torch.autocast(device, dtype, enabled) if known else nullcontext():
            out: Tensor = module(make())
        return out

    return through


def _place(x: Tensor) -> tuple[int, int]:
    """Which memory a tensor lies in; unlike `data_ptr` also for tensors without any (planning)."""
    return int(x.untyped_storage()._cdata), int(x.storage_offset())


def recompute_in_backward(
    *inputs: Tensor, recipes: Sequence[Recipe | None] = ()
) -> AbstractContextManager[object]:
    """Around an operation on `inputs`: those with a recipe, of their own or in `recipes`, are not kept for backward."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()
    makes = {
        _place(x): (x.numel(), x.dtype, make)
        for x, given in zip_longest(inputs, recipes)
        if (make := given or recompute_fn(x)) is not None
    }
    if not makes:
        return nullcontext()

    def pack(kept: Tensor) -> Tensor | Recipe:
        count, dtype, make = makes.get(_place(kept), (0, None, None))
        if make is None or (count, dtype) != (kept.numel(), kept.dtype):
            return kept
        shape, stride = kept.shape, kept.stride()  # a view of the input, perhaps
        return lambda: make().as_strided(shape, stride)

    return saved_tensors_hooks(pack, lambda kept: kept if isinstance(kept, Tensor) else kept())


# ---- instance norm through batch norm: a sample's channel is a channel of its own ----


def _dense(x: Tensor) -> Tensor:
    last = x.is_contiguous(memory_format=torch.channels_last_3d)
    return x if last or x.is_contiguous() else x.contiguous()


def _like(x: Tensor, other: Tensor) -> Tensor:
    """`x` in the memory format of `other`."""
    last = other.is_contiguous(memory_format=torch.channels_last_3d) and not other.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)


def _sheets(x: Tensor) -> list[Tensor]:
    """Views whose channels batch norm may take one by one: all samples at once, or each when channels lie innermost."""
    if x.is_contiguous():
        return [x.view(1, -1, *x.shape[2:])]
    return list(x.split(1))


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normed x, mean and inverse standard deviation of each sheet's channels, stacked."""
    sheets = _sheets(x)
    times = len(x) // len(sheets)
    weight, bias = weight.repeat(times), bias.repeat(times)
    if len(sheets) == 1:
        out, mean, inverse_std, *_ = ops._batch_norm_impl_index(
            sheets[0], weight, bias, None, None, True, 0.0, eps, torch.backends.cudnn.enabled
        )
        return out.view_as(x), mean.unsqueeze(0), inverse_std.unsqueeze(0)
    out = torch.empty_like(x)
    mean, inverse_std = (
        torch.empty(len(sheets), len(weight), dtype=weight.dtype, device=x.device) for _ in range(2)
    )
    for i, (sheet, into) in enumerate(zip(sheets, out.split(1), strict=True)):
        ops.native_batch_norm.out(
            sheet,
            weight,
            bias,
            None,
            None,
            True,
            0.0,
            eps,
            out=into,
            save_mean=mean[i],
            save_invstd=inverse_std[i],
        )
    return out, mean, inverse_std


def _normalise(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, eps: float
) -> Tensor:
    """The norm with known statistics: one pass."""
    sheets = _sheets(x)
    times = len(x) // len(sheets)
    weight, bias, variance = weight.repeat(times), bias.repeat(times), inverse_std.pow(-2) - eps
    if len(sheets) == 1:
        out: Tensor = ops.native_batch_norm(
            sheets[0], weight, bias, mean[0], variance[0], False, 0.0, eps
        )[0]
        return out.view_as(x)
    out, unused = torch.empty_like(x), weight.new_empty(0)
    for i, (sheet, into) in enumerate(zip(sheets, out.split(1), strict=True)):
        ops.native_batch_norm.out(
            sheet,
            weight,
            bias,
            mean[i],
            variance[i],
            False,
            0.0,
            eps,
            out=into,
            save_mean=unused,
            save_invstd=unused,
        )
    return out


def _norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse_std: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias."""
    grads, sheets = _sheets(grad), _sheets(x)
    channels, repeated = len(weight), weight.repeat(len(x) // len(sheets))
    found = [
        ops.native_batch_norm_backward(
            grads[i],
            sheet,
            repeated,
            None,
            None,
            mean[i],
            inverse_std[i],
            True,
            eps,
            (True, True, True),
        )
        for i, sheet in enumerate(sheets)
    ]
    grad_x = found[0][0].view_as(x) if len(found) == 1 else torch.cat([f[0] for f in found])
    sums = [torch.cat([f[k] for f in found]).view(-1, channels).sum(0) for k in (1, 2)]
    return grad_x, sums[0], sums[1]
