"""The optimizers that `train.optimizer` can name.

A new optimizer is one `OptimizerSpec` in `OPTIMIZERS` and its name in the setting
(`config.train.TrainConfig`). Checkpoints, DeepSpeed and the memory estimate read the spec.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from liverseg_dist.config import TrainConfig
from liverseg_dist.config.registry import find_registered


@dataclass(frozen=True)
class OptimizerSpec:
    """How an optimizer is built, and which state it has for each parameter."""

    kind: type[torch.optim.Optimizer]
    build: Callable[[TrainConfig, Iterable[dict]], torch.optim.Optimizer]
    """From the settings and the parameter groups."""
    state_keys: Callable[[float], tuple[str, ...]]
    """Names of the state tensors that have the parameter's shape, given the momentum."""
    counts_steps: bool
    """Whether each parameter has a step counter, `step`."""

    def configured_state_keys(self, config: TrainConfig) -> tuple[str, ...]:
        """Return the names of the state tensors for these settings."""
        return self.state_keys(config.momentum)


def _build_sgd(config: TrainConfig, groups: Iterable[dict]) -> torch.optim.Optimizer:
    """Build SGD with Nesterov momentum, as nnU-Net does."""
    groups = list(groups)
    # PyTorch 2.13 has no fused SGD for DTensors.
    fused = None if config.strategy == "fsdp" else _may_be_fused(config, groups)
    return torch.optim.SGD(
        groups,
        fused=fused,
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
    )


def _build_adamw(config: TrainConfig, groups: Iterable[dict]) -> torch.optim.Optimizer:
    groups = list(groups)
    return torch.optim.AdamW(
        groups,
        fused=_may_be_fused(config, groups),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )


def _may_be_fused(config: TrainConfig, groups: Iterable[dict]) -> bool | None:
    """Whether one kernel updates all parameters; None: as PyTorch decides.

    Only on a GPU: on a CPU it is no faster and has other rounding. From stage 1 on ZeRO gives the
    optimizer other parameters.
    """
    is_sharded_by_zero = config.strategy == "deepspeed" and config.zero_stage > 0
    for group in groups:
        for parameter in group["params"]:
            if parameter.device.type != "cuda" or is_sharded_by_zero:
                return None
    return True


def _sgd_state_keys(momentum: float) -> tuple[str, ...]:
    return ("momentum_buffer",) if momentum else ()


def _adamw_state_keys(momentum: float) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq")


OPTIMIZERS: dict[str, OptimizerSpec] = {
    "sgd": OptimizerSpec(torch.optim.SGD, _build_sgd, _sgd_state_keys, counts_steps=False),
    "adamw": OptimizerSpec(torch.optim.AdamW, _build_adamw, _adamw_state_keys, counts_steps=True),
}
"""Optimizers by `train.optimizer`."""


def find_optimizer(config: TrainConfig) -> OptimizerSpec:
    """Return the configured optimizer's spec.

    Raises:
        UserError: unknown optimizer.
    """
    return find_registered(OPTIMIZERS, config.optimizer, "train.optimizer")


def build_optimizer(config: TrainConfig, groups: Iterable[dict]) -> torch.optim.Optimizer:
    """Build the configured optimizer. The learning rate is set again in each step.

    Raises:
        UserError: unknown optimizer.
    """
    return find_optimizer(config).build(config, groups)


def fill_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the state that the optimizer creates lazily in the first step.

    A checkpoint can then be loaded into it. Zeros are the start value of all optimizers here: SGD's
    first buffer is momentum * 0 + gradient, AdamW's moments start at 0.

    Raises:
        TypeError: the optimizer's class is not in `OPTIMIZERS`.
    """
    spec = _find_spec_of(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            # Frozen parameters have no state, in PyTorch's optimizers as well.
            if parameter.requires_grad:
                _fill_parameter_state(spec, state, parameter, group)


def _fill_parameter_state(
    spec: OptimizerSpec, state: dict[str, Tensor], parameter: Tensor, group: dict
) -> None:
    if spec.counts_steps and "step" not in state:
        # A fused optimizer counts on the parameter's device.
        device = parameter.device if group.get("fused") else None
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    for key in spec.state_keys(group.get("momentum", 0.0)):
        # SGD writes None until its first step.
        if state.get(key) is None:
            state[key] = torch.zeros_like(parameter.detach())


def _find_spec_of(optimizer: torch.optim.Optimizer) -> OptimizerSpec:
    for spec in OPTIMIZERS.values():
        if isinstance(optimizer, spec.kind):
            return spec
    raise TypeError(f"{type(optimizer).__name__} is not in OPTIMIZERS")
