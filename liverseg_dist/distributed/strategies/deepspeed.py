"""DeepSpeed ZeRO 0 to 3, with optional optimizer offload (https://arxiv.org/abs/1910.02054).

The state goes into checkpoints as whole tensors by DeepSpeed's per-parameter access functions, so that a run resumes on
any number of ranks (DeepSpeed's own ZeRO checkpoints are bound to theirs) and under any other strategy.
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
    fill_optimizer_state,
    loss_scale,
    named_tensors,
)
from liverseg_dist.distributed.world import backend_for

STATE_KEYS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}

BUCKET = 1 << 24
"""Numbers that ZeRO exchanges at once; its buffer of that size stays allocated."""


class DeepSpeedStrategy(Strategy):
    """A DeepSpeed engine around the module and a torch optimizer."""

    def __init__(
        self, plain: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig
    ) -> None:
        super().__init__(plain, optimizer, config.clip_grad_norm, config.precision)
        self._keys = (
            STATE_KEYS[config.optimizer] if config.optimizer == "adamw" or config.momentum else ()
        )
        device = next(plain.parameters()).device
        deepspeed = _import_deepspeed(device)
        self._utils = deepspeed.utils
        if (
            self._autocast_dtype is not None
        ):  # around the engine it would not count: DeepSpeed switches it off inside
            plain.forward = torch.autocast(device.type, self._autocast_dtype)(plain.forward)
        if (
            not dist.is_initialized()
        ):  # DeepSpeed wants a group of one, too; `World.connected` ends it
            dist.init_process_group(
                backend_for(device), store=dist.HashStore(), rank=0, world_size=1
            )
        # The GPU that DeepSpeed takes, now and later; only torchrun sets it. `World.connected` puts it back.
        os.environ["LOCAL_RANK"] = str(device.index or 0)
        self._engine, _, _, _ = deepspeed.initialize(
            model=plain, optimizer=optimizer, config=_engine_config(config)
        )
        self._sharded = config.zero_stage > 0
        self._stage = config.zero_stage
        self.skips_nonfinite = not self._sharded  # DeepSpeed updates before it tells the norm

    def forward(self, image_BCDHW: Tensor, *, last: bool) -> Tensor | list[Tensor]:
        self._engine.set_gradient_accumulation_boundary(last)
        return self._engine(image_BCDHW)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * loss_scale())

    def step(self, learning_rate: float) -> float:
        if (
            not self._sharded
        ):  # stage 0 is plain data parallelism; the engine has averaged the gradients by now
            return super().step(learning_rate)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def skip(self) -> None:
        self._engine.zero_grad()
        self._engine.optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        if not self._sharded:
            return super().state()
        self._fill()
        tensors = {f"model.{name}": tensor for name, tensor in self.weights().items()}
        for name, parameter in self.plain.named_parameters():
            for key in self._keys:
                value = self._utils.safe_get_full_optimizer_state(parameter, key)
                whole = (
                    torch.zeros(tensors[f"model.{name}"].shape)
                    if value is None
                    else value.float().cpu()
                )
                tensors[f"optimizer.{name}.{key}"] = whole.reshape(tensors[f"model.{name}"].shape)
            if "exp_avg" in self._keys:
                tensors[f"optimizer.{name}.step"] = torch.tensor(float(self._count()))
        return tensors

    def state_loaded(self, tensors: dict[str, Tensor]) -> None:
        if not self._sharded:
            return
        base = self._engine.optimizer.optimizer
        for name, parameter in self.plain.named_parameters():
            self._set(parameter, tensors[f"model.{name}"], None)
            for key in self._keys:
                self._set(parameter, tensors[f"optimizer.{name}.{key}"], key)
            if "exp_avg" in self._keys:
                for state in base.state.values():
                    state["step"] = tensors[f"optimizer.{name}.step"].clone()

    def weights(self) -> dict[str, Tensor]:
        if self._stage < 3:  # copies on a CPU, too, as they are on a GPU
            return {
                name: value.detach().to("cpu", torch.float32, copy=True)
                for name, value in named_tensors(self.plain)
            }
        whole = {}
        for name, parameter in self.plain.named_parameters():
            value = self._utils.safe_get_full_fp32_param(parameter).float().cpu()
            whole[name] = value.flatten()[: parameter.ds_numel].reshape(parameter.ds_shape)  # type: ignore[attr-defined]
        return whole

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Write a whole parameter (`key` None) or optimizer tensor into what this rank holds of it."""
        if self._stage == 3:
            # Cut by hand: DeepSpeed's whole-value setter fails where the padded parts do not divide the parameter.
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
            self._utils.safe_set_full_fp32_param(
                parameter, value
            )  # the part of it that this rank updates
            parameter.data.copy_(value)
        else:
            self._utils.safe_set_full_optimizer_state(parameter, value, key)

    def _fill(self) -> None:
        """Optimizer state that DeepSpeed makes at the first step, so that a checkpoint can be loaded before it."""
        outer = self._engine.optimizer
        if self._stage == 3:  # its torch optimizer is given the partitions only while it steps
            base, lists = (
                outer.optimizer,
                [group["params"] for group in outer.optimizer.param_groups],
            )
            base.param_groups[0]["params"] = list(outer.fp32_partitioned_groups_flat)
            fill_optimizer_state(base)
            for group, parameters in zip(base.param_groups, lists, strict=True):
                group["params"] = parameters
        else:
            fill_optimizer_state(outer.optimizer)
            outer._lazy_init_hp_params_optimizer_state()

    def _count(self) -> int:
        states = self._engine.optimizer.optimizer.state.values()
        return int(next((state["step"] for state in states if "step" in state), 0))


def _engine_config(config: TrainConfig) -> dict[str, Any]:
    # DeepSpeed's own 5e8 numbers would be allocated at once: 1.9 GiB for networks of a few hundred MiB.
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if config.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = (
            0  # parameters kept whole would not see a loaded checkpoint
        )
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
    """DeepSpeed, told of the device first. Imported late: it takes seconds, and only this strategy needs it."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    if (
        device.type == "cpu"
    ):  # otherwise its shared-memory all-reduce is compiled anew for a minute or two at each start
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
