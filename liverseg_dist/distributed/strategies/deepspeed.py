"""DeepSpeed ZeRO 0 to 3, with optional optimizer offload (https://arxiv.org/abs/1910.02054).

Checkpoints contain complete tensors, read by DeepSpeed's per-parameter access functions. A run
therefore resumes on any number of ranks (DeepSpeed's own ZeRO checkpoints need the same number) and
under any other strategy.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from liverseg_dist.config import TrainConfig
from liverseg_dist.distributed.collectives import current_rank, world_size
from liverseg_dist.distributed.strategies.base import (
    Strategy,
    loss_scale,
    named_tensors,
)
from liverseg_dist.distributed.strategies.optimizers import fill_optimizer_state, find_optimizer
from liverseg_dist.distributed.world import backend_for
from liverseg_dist.precision import find_autocast_dtype

BUCKET = 1 << 24
"""Numbers that ZeRO exchanges at once; its buffer of this size stays allocated."""


class DeepSpeedStrategy(Strategy):
    """A DeepSpeed engine around the module and a torch optimizer."""

    def __init__(
        self, plain: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig
    ) -> None:
        super().__init__(plain, optimizer, config.clip_grad_norm, config.precision)
        spec = find_optimizer(config)
        self._keys = spec.configured_state_keys(config)
        self._counts_steps = spec.counts_steps
        device = next(plain.parameters()).device
        deepspeed = _import_deepspeed(device)
        self._utils = deepspeed.utils
        autocast_dtype = find_autocast_dtype(config.precision)
        if autocast_dtype is not None:
            # Around the engine it would have no effect: DeepSpeed switches autocast off inside.
            plain.forward = torch.autocast(device.type, autocast_dtype)(plain.forward)
        if not dist.is_initialized():
            # DeepSpeed needs a process group also for one process; `World.connected` destroys it.
            dist.init_process_group(
                backend_for(device), store=dist.HashStore(), rank=0, world_size=1
            )
        # DeepSpeed takes this GPU, now and later; only torchrun sets the variable.
        # `World.connected` restores it.
        os.environ["LOCAL_RANK"] = str(device.index or 0)
        self._engine, _, _, _ = deepspeed.initialize(
            model=plain, optimizer=optimizer, config=_engine_config(config)
        )
        self._sharded = config.zero_stage > 0
        self._stage = config.zero_stage
        # DeepSpeed updates the weights before it returns the norm.
        self.skips_nonfinite = not self._sharded

    def forward(self, image_BCDHW: Tensor, *, last: bool) -> Tensor | list[Tensor]:
        # DeepSpeed exchanges gradients at this boundary only.
        self._engine.set_gradient_accumulation_boundary(last)
        return self._engine(image_BCDHW)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * loss_scale())

    def step(self, learning_rate: float, *, skip_if: Tensor | None = None) -> Tensor:
        if not self._sharded:
            # Stage 0 is plain data parallelism; the engine has averaged the gradients in backward.
            return super().step(learning_rate, skip_if=skip_if)
        # DeepSpeed updates in any case, so the host has to know it before.
        if skip_if is not None and bool(skip_if):
            self.skip()
            return torch.tensor(float("nan"))
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        # DeepSpeed itself waits for the device to compute it.
        return torch.as_tensor(float("nan") if norm is None else norm)

    def skip(self) -> None:
        self._engine.zero_grad()
        self._engine.optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        if not self._sharded:
            return super().state()
        self._create_optimizer_state()
        tensors = {f"model.{name}": tensor for name, tensor in self.weights().items()}
        for name, parameter in self.plain.named_parameters():
            for key in self._keys:
                value = self._utils.safe_get_full_optimizer_state(parameter, key)
                shape = tensors[f"model.{name}"].shape
                full = torch.zeros(shape) if value is None else value.float().cpu()
                tensors[f"optimizer.{name}.{key}"] = full.reshape(shape)
            if self._counts_steps:
                tensors[f"optimizer.{name}.step"] = torch.tensor(float(self._read_step_count()))
        return tensors

    def state_loaded(self, tensors: dict[str, Tensor]) -> None:
        if not self._sharded:
            return
        base = self._engine.optimizer.optimizer
        for name, parameter in self.plain.named_parameters():
            self._write_tensor(parameter, tensors[f"model.{name}"], None)
            for key in self._keys:
                self._write_tensor(parameter, tensors[f"optimizer.{name}.{key}"], key)
            if self._counts_steps:
                for state in base.state.values():
                    state["step"] = tensors[f"optimizer.{name}.step"].clone()

    def weights(self) -> dict[str, Tensor]:
        weights = {}
        if self._stage < 3:
            for name, value in named_tensors(self.plain):
                # A copy also on a CPU: the next step must not change the result.
                weights[name] = value.detach().to("cpu", torch.float32, copy=True)
            return weights
        for name, parameter in self.plain.named_parameters():
            value = self._utils.safe_get_full_fp32_param(parameter).float().cpu()
            numel, shape = parameter.ds_numel, parameter.ds_shape  # type: ignore[attr-defined]
            weights[name] = value.flatten()[:numel].reshape(shape)
        return weights

    def _write_tensor(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Write a complete tensor into this rank's shard of it.

        Args:
            parameter: the parameter to which the tensor belongs.
            value: complete tensor.
            key: name of the optimizer state; None: the parameter itself.
        """
        if self._stage == 3:
            # Sharded here: DeepSpeed's setter for complete values fails where the padded shards do
            # not divide the parameter.
            part = parameter.ds_tensor  # type: ignore[attr-defined]
            flat = nn.functional.pad(
                value.flatten(), (0, part.numel() * world_size() - value.numel())
            )
            local = flat.narrow(0, part.numel() * current_rank(), part.numel())
            if key is None:
                self._utils.safe_set_local_fp32_param(parameter, local)
                part.data.copy_(local)
            else:
                self._utils.safe_set_local_optimizer_state(parameter, local, key)
        elif key is None:
            # The setter writes the shard that this rank updates, the copy all the rest.
            self._utils.safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)
        else:
            self._utils.safe_set_full_optimizer_state(parameter, value, key)

    def _create_optimizer_state(self) -> None:
        """Create the optimizer state that DeepSpeed creates in the first step.

        A checkpoint can then be loaded before that step.
        """
        outer = self._engine.optimizer
        if self._stage == 3:
            # DeepSpeed gives the shards to the torch optimizer only during a step.
            base = outer.optimizer
            lists = [group["params"] for group in base.param_groups]
            base.param_groups[0]["params"] = list(outer.fp32_partitioned_groups_flat)
            fill_optimizer_state(base)
            for group, parameters in zip(base.param_groups, lists, strict=True):
                group["params"] = parameters
        else:
            fill_optimizer_state(outer.optimizer)
            outer._lazy_init_hp_params_optimizer_state()

    def _read_step_count(self) -> int:
        states = self._engine.optimizer.optimizer.state.values()
        return int(next((state["step"] for state in states if "step" in state), 0))


def _engine_config(config: TrainConfig) -> dict[str, Any]:
    """Return DeepSpeed's configuration for these settings."""
    # DeepSpeed's default of 5e8 numbers would be allocated at once: 1.9 GiB, for networks of a few
    # hundred MiB.
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if config.zero_stage == 3:
        # Parameters that stay complete would not get the values of a loaded checkpoint.
        zero["stage3_param_persistence_threshold"] = 0
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_clipping": config.clip_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for this kind of device.

    The import is late because it takes seconds and only this strategy needs it.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        # Otherwise DeepSpeed compiles its shared-memory all-reduce at each start, for 1 to 2
        # minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
