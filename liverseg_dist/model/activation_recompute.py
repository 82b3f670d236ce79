"""Recomputation of activations in backward: the same mathematics with half the memory.

A convolution stores its input for the gradient of its weights, and the norm before it stores its
own input, although the first follows from the second by a cheap pass. Here instance norm and leaky
ReLU are one function that stores the norm's input; the convolutions after it store only a function
that recomputes their input. Unlike inverting the activation (https://arxiv.org/abs/1712.02616) this
works for any scale, also zero, and in bf16.

All tensors are stored with `save_for_backward`, so this works together with
`torch.utils.checkpoint`, offloading hooks, FSDP and ZeRO: backward uses a parameter only through
its own module. Under `torch.compile` the plain operations are used; its partitioner decides what to
store.

Used by `convolution`, `blocks` and `unet`.
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

Recompute = Callable[[], Tensor]
"""Recomputes one tensor in backward."""
ops = torch.ops.aten


class InstanceNormAct(nn.InstanceNorm3d):
    """Affine instance norm, then leaky ReLU with `slope` (1: none).

    Names and values of the parameters are those of `nn.InstanceNorm3d`.
    """

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
    """Instance norm and leaky ReLU as one differentiable function."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float
    ) -> Tensor:
        x = _make_dense(x)
        out, mean, inverse_std = _apply_norm(x, weight, bias, eps)
        # Copies, because a sharding strategy may have freed the parameters before backward.
        ctx.save_for_backward(x, weight.detach().clone(), bias.detach().clone(), mean, inverse_std)
        ctx.eps, ctx.slope, ctx.unpacked = eps, slope, None
        return out if slope == 1 else F.leaky_relu_(out, slope)

    @staticmethod
    def recompute(ctx: Any) -> Tensor:
        """Recompute the output with the same operations, so that all bits are equal."""
        # Checkpointing returns each stored tensor only once.
        if ctx.unpacked is None:
            ctx.unpacked = ctx.saved_tensors
        x, weight, bias, *_ = ctx.unpacked
        out, *_ = _apply_norm(x, weight, bias, ctx.eps)
        return out if ctx.slope == 1 else F.leaky_relu_(out, ctx.slope)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse_std = ctx.unpacked or ctx.saved_tensors
        ctx.unpacked = None
        if ctx.slope != 1:
            # The sign of the activation's input determines the slope; the gradient is written into
            # the memory of that input.
            normed = _apply_known_norm(x, weight, bias, mean, inverse_std, ctx.eps)
            grad = ops.leaky_relu_backward.grad_input(
                _match_memory_format(grad, normed), normed, ctx.slope, False, grad_input=normed
            )
        gradients = _compute_norm_gradients(
            _match_memory_format(grad, x), x, weight, mean, inverse_std, ctx.eps
        )
        return (*gradients, None, None)


def recompute_fn(x: Tensor) -> Recompute | None:
    """Return a function that recomputes `x` in backward; None: `x` must be stored."""
    if torch.compiler.is_compiling():
        return None
    node: Any = x.grad_fn
    if not isinstance(node, _NormAct._backward_cls) or getattr(node, "is_stored", False):
        return None

    @torch.no_grad()
    def recompute() -> Tensor:
        return _NormAct.recompute(node)

    return recompute


def keep_storage(x: Tensor) -> Tensor:
    """Mark `x` as stored, so that the operations that use it do not recompute it.

    This is needed for the output of a checkpointed stage, whose own inputs are not stored.
    """
    if recompute_fn(x) is not None:
        node: Any = x.grad_fn
        node.is_stored = True
    return x


def recompute_fn_through(module: nn.Module, x: Tensor) -> Recompute | None:
    """Return a function that recomputes `module(x)`; None where nothing is recomputed.

    The function calls the module, so that sharding gathers its weights. Use it only for a module
    that stores `x` for its own backward, so that no tensor stays alive for longer.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    recompute_input = recompute_fn(x) or partial(Tensor.detach, x.detach())
    device = x.device.type
    # Meta tensors (memory estimates) have no autocast.
    has_autocast = torch.amp.is_autocast_available(device)
    enabled = has_autocast and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if has_autocast else None

    @torch.no_grad()
    def recompute() -> Tensor:
        with torch.autocast(device, dtype, enabled) if has_autocast else nullcontext():
            out: Tensor = module(recompute_input())
        return out

    return recompute


def _storage_position(x: Tensor) -> tuple[int, int]:
    """Return storage and offset of a tensor.

    Unlike `data_ptr` this also identifies tensors without memory (memory estimates).
    """
    return int(x.untyped_storage()._cdata), int(x.storage_offset())


def recompute_in_backward(
    *inputs: Tensor, functions: Sequence[Recompute | None] = ()
) -> AbstractContextManager[object]:
    """Return a context for an operation, in which `inputs` are not stored for backward if possible.

    Args:
        inputs: inputs of the operation.
        functions: for each input a function that recomputes it; None: if possible, it is found from
            the input. Inputs without a function are stored.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()
    recomputable = {}
    for x, function in zip_longest(inputs, functions):
        function = function or recompute_fn(x)
        if function is not None:
            recomputable[_storage_position(x)] = (x.numel(), x.dtype, function)
    if not recomputable:
        return nullcontext()

    def pack(saved: Tensor) -> Tensor | Recompute:
        entry = recomputable.get(_storage_position(saved))
        # The same memory with another size or type is another tensor.
        if entry is None or entry[:2] != (saved.numel(), saved.dtype):
            return saved
        recompute = entry[2]
        # The operation may save a view of its input.
        shape, stride = saved.shape, saved.stride()
        return lambda: recompute().as_strided(shape, stride)

    return saved_tensors_hooks(pack, lambda saved: saved if isinstance(saved, Tensor) else saved())


# Instance norm is computed by batch norm, where each channel of each sample is one channel.


def _make_dense(x: Tensor) -> Tensor:
    """Return `x` in one of the two memory formats that are handled here."""
    last = x.is_contiguous(memory_format=torch.channels_last_3d)
    return x if last or x.is_contiguous() else x.contiguous()


def _match_memory_format(x: Tensor, other: Tensor) -> Tensor:
    """Return `x` in the memory format of `other`."""
    last = other.is_contiguous(memory_format=torch.channels_last_3d) and not other.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)


def _channel_views(x: Tensor) -> list[Tensor]:
    """Return views whose channels batch norm can normalise separately.

    One view of all samples, or one for each sample if channels are the innermost axis.
    """
    if x.is_contiguous():
        return [x.view(1, -1, *x.shape[2:])]
    return list(x.split(1))


def _apply_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalised x, and mean and inverse standard deviation of each view's channels."""
    views = _channel_views(x)
    # Batch norm sees the samples as further channels.
    times = len(x) // len(views)
    weight, bias = weight.repeat(times), bias.repeat(times)
    if len(views) == 1:
        out, mean, inverse_std, *_ = ops._batch_norm_impl_index(
            views[0], weight, bias, None, None, True, 0.0, eps, torch.backends.cudnn.enabled
        )
        return out.view_as(x), mean.unsqueeze(0), inverse_std.unsqueeze(0)
    out = torch.empty_like(x)
    mean = torch.empty(len(views), len(weight), dtype=weight.dtype, device=x.device)
    inverse_std = torch.empty_like(mean)
    for i, (view, target) in enumerate(zip(views, out.split(1), strict=True)):
        ops.native_batch_norm.out(
            view,
            weight,
            bias,
            None,
            None,
            True,
            0.0,
            eps,
            out=target,
            save_mean=mean[i],
            save_invstd=inverse_std[i],
        )
    return out, mean, inverse_std


def _apply_known_norm(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, eps: float
) -> Tensor:
    """Apply the norm with known statistics, in one pass."""
    views = _channel_views(x)
    # Batch norm sees the samples as further channels.
    times = len(x) // len(views)
    weight, bias, variance = weight.repeat(times), bias.repeat(times), inverse_std.pow(-2) - eps
    if len(views) == 1:
        out: Tensor = ops.native_batch_norm(
            views[0], weight, bias, mean[0], variance[0], False, 0.0, eps
        )[0]
        return out.view_as(x)
    out, unused = torch.empty_like(x), weight.new_empty(0)
    for i, (view, target) in enumerate(zip(views, out.split(1), strict=True)):
        ops.native_batch_norm.out(
            view,
            weight,
            bias,
            mean[i],
            variance[i],
            False,
            0.0,
            eps,
            out=target,
            save_mean=unused,
            save_invstd=unused,
        )
    return out


def _compute_norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse_std: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight and bias."""
    grads, views = _channel_views(grad), _channel_views(x)
    channels, repeated = len(weight), weight.repeat(len(x) // len(views))
    wanted = (True, True, True)
    inputs, weights, biases = [], [], []
    for i, view in enumerate(views):
        grad_input, grad_weight, grad_bias = ops.native_batch_norm_backward(
            grads[i], view, repeated, None, None, mean[i], inverse_std[i], True, eps, wanted
        )
        inputs.append(grad_input)
        weights.append(grad_weight)
        biases.append(grad_bias)
    grad_x = inputs[0].view_as(x) if len(inputs) == 1 else torch.cat(inputs)
    # All samples share weight and bias, so their gradients are summed.
    weight_sum = torch.cat(weights).view(-1, channels).sum(0)
    return grad_x, weight_sum, torch.cat(biases).view(-1, channels).sum(0)
