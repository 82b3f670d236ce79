"""`Strategy`: the one face of DDP, FSDP2 and DeepSpeed. The loop, the losses and the logs see only this.

A step is, for each micro-batch, `forward(image, last=...)` and `backward(loss)`; then `step(rate)` or `skip()`.
Losses arrive scaled so that their sum over all ranks and micro-batches is the mean over the global batch.

State is named tensors, `model.<parameter>` and `optimizer.<parameter>.<key>`: the same names for every strategy, so a
checkpoint of one resumes on another and on any number of ranks.
"""

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from liverseg_dist.distributed.collectives import world_size

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Strategy(ABC):
    """A model spread over ranks, with its optimizer."""

    skips_nonfinite = True
    """Whether a gradient that is not finite leaves the weights as they were."""

    def __init__(
        self,
        plain: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip_grad_norm: float,
        precision: str,
    ) -> None:
        self.plain = plain
        """The module itself, with its own parameter names."""
        self.optimizer = optimizer
        self.clip_grad_norm = clip_grad_norm
        self._autocast_dtype = AUTOCAST_DTYPES.get(precision)
        device_type = next(plain.parameters()).device.type
        self._device_type = device_type
        self.scaler = torch.amp.GradScaler(device_type, enabled=precision == "fp16")

    def autocast(self) -> AbstractContextManager[object]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self._device_type, dtype=self._autocast_dtype)

    @abstractmethod
    def forward(self, image_BCDHW: Tensor, *, last: bool) -> Tensor | list[Tensor]:
        """The model's output. `last`: the rank's last micro-batch of the step, whose backward exchanges gradients."""

    def settle(self, image_BCDHW: Tensor) -> None:  # noqa: B027 - most strategies need none
        """Called once before the first step, also of a resumed run, with an input of the usual shape."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients."""

    def step(self, learning_rate: float) -> float:
        """Clip, update, forget the gradients; returns the global gradient norm before clipping.

        A norm that is not finite means that nothing was updated.
        """
        self.scaler.unscale_(self.optimizer)
        limit = self.clip_grad_norm or float("inf")
        norm = float(_full(nn.utils.clip_grad_norm_(self.plain.parameters(), limit)))
        if not self.scaler.is_enabled() and not math.isfinite(norm):
            self.skip()
            return norm
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skip()
        return norm

    def skip(self) -> None:
        """Forget the gradients of this step."""
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Tensors (DTensors where sharded) that make up the training state; loading writes into them in place."""
        fill_optimizer_state(self.optimizer)
        tensors = {f"model.{name}": tensor.detach() for name, tensor in named_tensors(self.plain)}
        for name, parameter in self.plain.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def state_loaded(self, tensors: dict[str, Tensor]) -> None:  # noqa: B027 - loaded in place
        """Called once the tensors of `state()` have been overwritten from a checkpoint."""

    def weights(self) -> dict[str, Tensor]:
        """Whole weights on every rank, float32 on the CPU, under the plain model's names. A collective call."""
        return {
            name: _full(tensor.detach()).float().cpu() for name, tensor in named_tensors(self.plain)
        }


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def fill_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state its optimizer makes lazily at the first step, so that it can be loaded into.

    Zeros are what both start from: SGD's first buffer equals momentum * 0 + gradient, AdamW's moments begin at 0.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not parameter.requires_grad:
                continue
            if isinstance(optimizer, torch.optim.SGD):
                if group["momentum"] and state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter.detach())
            elif not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter.detach())
                state["exp_avg_sq"] = torch.zeros_like(parameter.detach())


def _full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (a collective), or the tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def loss_scale() -> int:
    """DDP and FSDP average over ranks; multiplying the loss by the number of ranks makes that a sum."""
    return world_size()
