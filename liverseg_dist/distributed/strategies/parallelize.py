"""The one place where a model is distributed over devices. The order is fixed:

activation checkpointing -> torch.compile -> DDP | FSDP2 | DeepSpeed -> optimizer state.

A new strategy is a subclass of `base.Strategy`, a builder in `STRATEGIES` and its name in the
setting (`config.train.TrainConfig`); its memory is in `planning.memory_estimate`.
"""

from collections.abc import Callable, Collection, Iterable

import torch
from torch import nn

from liverseg_dist.config import TrainConfig
from liverseg_dist.config.registry import find_registered
from liverseg_dist.distributed.collectives import broadcast_module, world_size
from liverseg_dist.distributed.strategies.base import Strategy
from liverseg_dist.distributed.strategies.ddp import DataParallel, DeterministicReduction
from liverseg_dist.distributed.strategies.deepspeed import DeepSpeedStrategy
from liverseg_dist.distributed.strategies.fsdp import FullyShard, apply_fully_shard
from liverseg_dist.distributed.strategies.optimizers import build_optimizer
from liverseg_dist.errors import UserError

ParameterGroups = Callable[[nn.Module], Iterable[dict]]
"""Returns the optimizer's parameter groups of a module whose parameters have their final form."""
StrategyBuilder = Callable[[nn.Module, TrainConfig, ParameterGroups], Strategy]


def check_strategy(config: TrainConfig, ranks: int, device: torch.device) -> None:
    """Refuse combinations of settings that do not work, before anything is built.

    Raises:
        UserError: names the settings and the remedy.
    """
    find_registered(STRATEGIES, config.strategy, "train.strategy")
    _check_batch(config, ranks)
    _check_sharding(config, ranks)
    _check_arithmetic(config, device)
    _check_exchange(config)
    _check_deepspeed(config)


def _check_batch(config: TrainConfig, ranks: int) -> None:
    if ranks > config.global_batch_size:
        raise UserError(
            f"train.global_batch_size = {config.global_batch_size} leaves some of {ranks} ranks "
            f"without a sample; set train.global_batch_size={ranks}, or use fewer ranks"
        )
    if config.strategy != "ddp" and config.global_batch_size % ranks:
        raise UserError(
            f"train.strategy={config.strategy} needs the same number of samples on each rank: "
            f"train.global_batch_size = {config.global_batch_size} is not a multiple of "
            f"{ranks} ranks"
        )


def _check_sharding(config: TrainConfig, ranks: int) -> None:
    if config.fsdp_shard_ranks and config.strategy != "fsdp":
        raise UserError(f"train.fsdp_shard_ranks needs train.strategy=fsdp, not {config.strategy}")
    if ranks > config.fsdp_shard_ranks > 0 and ranks % config.fsdp_shard_ranks:
        raise UserError(
            f"train.fsdp_shard_ranks = {config.fsdp_shard_ranks}: {ranks} ranks cannot be divided "
            "into groups of this size; use the number of ranks per node, or 0"
        )
    if not config.fsdp_reshard_after_forward and config.strategy != "fsdp":
        raise UserError(
            "train.fsdp_reshard_after_forward=false needs train.strategy=fsdp, "
            f"not {config.strategy}"
        )


def _check_arithmetic(config: TrainConfig, device: torch.device) -> None:
    if config.deterministic_reduction and (
        config.strategy != "ddp" or config.micro_batch_size != 1
    ):
        raise UserError(
            "train.deterministic_reduction needs train.strategy=ddp and train.micro_batch_size=1: "
            "it adds gradients sample by sample"
        )
    if config.channels_last and config.strategy != "ddp":
        raise UserError(
            "train.channels_last works with strategy ddp only: "
            f"{config.strategy} shards contiguous parameters"
        )
    if config.precision == "fp16" and config.strategy != "ddp":
        raise UserError(
            f"train.precision=fp16 works with strategy ddp only, not {config.strategy}; use bf16"
        )
    if config.precision == "tf32" and device.type != "cuda":
        raise UserError("train.precision=tf32 needs an NVIDIA GPU; use fp32 on a CPU")
    if config.compile and config.strategy == "fsdp":
        raise UserError(
            "train.compile works with strategies ddp and deepspeed, not fsdp: torch 2.13 cannot "
            "compile gathered parameters; deepspeed with zero_stage=3 shards the same state"
        )


def _check_exchange(config: TrainConfig) -> None:
    if config.ddp_static_graph and (config.strategy != "ddp" or config.deterministic_reduction):
        raise UserError(
            "train.ddp_static_graph needs train.strategy=ddp without train.deterministic_reduction"
        )
    if config.reduce_precision == "fp32":
        return
    if config.strategy == "deepspeed":
        raise UserError(
            "train.reduce_precision=bf16 works with strategies ddp and fsdp, not deepspeed"
        )
    if config.deterministic_reduction:
        raise UserError(
            "train.reduce_precision=bf16 with train.deterministic_reduction: rounded sums would "
            "depend on the number of ranks; use fp32"
        )


def _check_deepspeed(config: TrainConfig) -> None:
    is_deepspeed = config.strategy == "deepspeed"
    if config.ema_decay and is_deepspeed and config.zero_stage == 3:
        raise UserError(
            "train.ema_decay with DeepSpeed ZeRO 3: no rank has the whole weights that are to be "
            "averaged; use zero_stage 2"
        )
    is_fine_tuned = config.fine_tune.freeze != "none" or config.fine_tune.layer_decay != 1
    if is_fine_tuned and is_deepspeed and config.zero_stage > 0:
        raise UserError(
            "train.fine_tune works with strategies ddp and fsdp and with DeepSpeed's zero_stage 0: "
            "from stage 1 on DeepSpeed shards all parameters as one group"
        )
    if config.offload_optimizer and config.zero_stage == 2 and config.on_nonfinite == "skip":
        raise UserError(
            "train.on_nonfinite=skip with train.offload_optimizer and zero_stage 2: DeepSpeed would "
            "add the bad gradient to the next step; use zero_stage 1 or 3"
        )
    if config.offload_optimizer and (not is_deepspeed or config.zero_stage == 0):
        raise UserError(
            "train.offload_optimizer needs train.strategy=deepspeed and train.zero_stage of 1 to 3"
        )


def parallelize_model(
    model: nn.Module,
    device: torch.device,
    config: TrainConfig,
    checkpointed_levels: Collection[int],
    parameter_groups: ParameterGroups,
) -> Strategy:
    """Put the model on its device and distribute it with the configured strategy.

    Args:
        model: network with `set_checkpointing` and `shard_groups` (`model.unet.UNet`).
        device: this rank's device.
        config: settings `train.*`.
        checkpointed_levels: levels whose activations are recomputed in backward.
        parameter_groups: returns the optimizer's groups; called when the parameters have their
            final form.

    Returns:
        The distributed model with its optimizer.

    Raises:
        UserError: unknown strategy or optimizer.
    """
    build = find_registered(STRATEGIES, config.strategy, "train.strategy")
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    model.set_checkpointing(checkpointed_levels)  # type: ignore[operator]
    if config.compile:
        model.compile()
    broadcast_module(model)
    return build(model, config, parameter_groups)


def _build_ddp(model: nn.Module, config: TrainConfig, groups: ParameterGroups) -> Strategy:
    optimizer = build_optimizer(config, groups(model))
    if config.deterministic_reduction:
        return DeterministicReduction(model, optimizer, config.clip_grad_norm, config.precision)
    return DataParallel(
        model,
        optimizer,
        config.clip_grad_norm,
        config.precision,
        is_static=config.ddp_static_graph,
        reduce_precision=config.reduce_precision,
    )


def _build_fsdp(model: nn.Module, config: TrainConfig, groups: ParameterGroups) -> Strategy:
    # One rank has nothing to shard.
    if world_size() == 1:
        return _build_ddp(model, config, groups)
    apply_fully_shard(model, config)
    optimizer = build_optimizer(config, groups(model))
    return FullyShard(model, optimizer, config.clip_grad_norm, config.precision)


def _build_deepspeed(model: nn.Module, config: TrainConfig, groups: ParameterGroups) -> Strategy:
    return DeepSpeedStrategy(model, build_optimizer(config, groups(model)), config)


STRATEGIES: dict[str, StrategyBuilder] = {
    "ddp": _build_ddp,
    "fsdp": _build_fsdp,
    "deepspeed": _build_deepspeed,
}
"""Builders by `train.strategy`."""
