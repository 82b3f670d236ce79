"""`Strategy`: the common interface of DDP, FSDP2 and DeepSpeed.

The training loop uses only this interface. A step is, for each micro-batch, `forward(image,
last=...)` and `backward(loss)`; then `step(rate)` or `skip()`. Losses are scaled so that their sum
over all ranks and micro-batches is the mean over the global batch.

The state is a set of named tensors, `model.<parameter>` and `optimizer.<parameter>.<key>`. The
names are the same for every strategy, so a run resumes under another strategy and on any number of
ranks.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from liverseg_dist.distributed.collectives import world_size
from liverseg_dist.distributed.strategies.conditional_update import update_unless
from liverseg_dist.distributed.strategies.optimizers import fill_optimizer_state
from liverseg_dist.precision import autocast


class Strategy(ABC):
    """A model that is distributed over ranks, with its optimizer.

    Args:
        plain: the module itself.
        optimizer: optimizer of the module's parameters.
        clip_grad_norm: largest norm of the gradient; 0: no clipping.
        precision: setting `train.precision`.
    """

    skips_nonfinite = True
    """Whether the weights do not change when the gradient is not finite."""

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
        self._precision = precision
        self._device_type = next(plain.parameters()).device.type
        # Only fp16 has so few exponent bits that small gradients become zero without scaling.
        self.scaler = torch.amp.GradScaler(self._device_type, enabled=precision == "fp16")

    def autocast(self) -> torch.autocast:
        """Return the context in which the network computes."""
        return autocast(self._device_type, self._precision)

    @abstractmethod
    def forward(self, image_BCDHW: Tensor, *, last: bool) -> Tensor | list[Tensor]:
        """Compute the model's output.

        Args:
            image_BCDHW: one micro-batch, normalised.
            last: whether it is the rank's last micro-batch of the step; its backward exchanges
                gradients.
        """

    def warm_up(self, image_BCDHW: Tensor) -> None:  # noqa: B027 - most strategies need none
        """Prepare before the first step, also of a resumed run.

        Args:
            image_BCDHW: an input of the shape of all later ones.
        """

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients."""

    def step(self, learning_rate: float, *, skip_if: Tensor | None = None) -> Tensor:
        """Clip the gradient, update the weights and delete the gradients.

        Nothing here waits for the device.

        Args:
            learning_rate: rate of this step.
            skip_if: bool scalar on the device. The weights stay as they are where it is true, and
                also if the gradient's norm is not finite. None: they are updated in any case.

        Returns:
            The global gradient norm before clipping, a scalar on the device.
        """
        self.scaler.unscale_(self.optimizer)
        # An infinite limit does not clip, but the norm is computed.
        limit = self.clip_grad_norm or float("inf")
        norm = _gather_full_tensor(nn.utils.clip_grad_norm_(self.plain.parameters(), limit))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        if self.scaler.is_enabled():
            self._update_scaled(skip_if)
        elif skip_if is None:
            self.optimizer.step()
        else:
            update_unless(self.optimizer, skip_if | ~torch.isfinite(norm))
        self.skip()
        return norm

    def _update_scaled(self, skip_if: Tensor | None) -> None:
        """Update with fp16: without effect where a gradient overflowed, and then reduce the scale.

        `GradScaler.step` does the same, but lets the host wait for the device.
        """
        scaler = self.scaler
        overflows = list(scaler._found_inf_per_device(self.optimizer).values())
        is_left_out = torch.stack(overflows).sum() > 0
        scale, growth = scaler._scale, scaler._growth_tracker
        assert scale is not None
        assert growth is not None
        before = scale.clone(), growth.clone()
        if skip_if is not None:
            is_left_out = is_left_out | skip_if
        update_unless(self.optimizer, is_left_out)
        scaler.update()
        if skip_if is not None:
            # A loss that is not finite is no evidence about the scale.
            for tensor, old in zip((scale, growth), before, strict=True):
                tensor.copy_(torch.where(skip_if, old, tensor))

    def skip(self) -> None:
        """Delete the gradients of this step."""
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of the training state (DTensors where sharded).

        A checkpoint is loaded into them in place.
        """
        fill_optimizer_state(self.optimizer)
        tensors = {f"model.{name}": tensor.detach() for name, tensor in named_tensors(self.plain)}
        for name, parameter in self.plain.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def state_loaded(self, tensors: dict[str, Tensor]) -> None:  # noqa: B027 - loaded in place
        """Take over the tensors of `state()` after a checkpoint was loaded into them."""

    def weights(self) -> dict[str, Tensor]:
        """Return the complete weights on every rank, float32 on the CPU. A collective call.

        The names are those of the plain model.
        """
        weights = {}
        for name, tensor in named_tensors(self.plain):
            weights[name] = _gather_full_tensor(tensor.detach()).float().cpu()
        return weights


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return parameters, then buffers, with their names."""
    return [*module.named_parameters(), *module.named_buffers()]


def _gather_full_tensor(tensor: Tensor) -> Tensor:
    """Return the complete tensor of a sharded one (a collective call), or the tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def loss_scale() -> int:
    """Return the factor that turns the average over ranks of DDP and FSDP into a sum."""
    return world_size()
