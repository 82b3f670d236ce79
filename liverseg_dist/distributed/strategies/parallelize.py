"""The one place where a model is spread over devices. The order is fixed:

activation checkpointing -> torch.compile -> DDP | FSDP2 | DeepSpeed -> optimizer state on top.
"""

from collections.abc import Callable, Collection, Iterable

import torch
from torch import nn

from liverseg_dist.config import TrainConfig
from liverseg_dist.distributed.collectives import broadcast_module, world_size
from liverseg_dist.distributed.strategies.base import Strategy
from liverseg_dist.distributed.strategies.ddp import DataParallel, DeterministicReduction
from liverseg_dist.distributed.strategies.deepspeed import DeepSpeedStrategy
from liverseg_dist.distributed.strategies.fsdp import FullyShard, apply_fully_shard
from liverseg_dist.errors import UserError

ParameterGroups = Callable[[nn.Module], Iterable[dict]]


def check_strategy(config: TrainConfig, ranks: int, device: torch.device) -> None:
    """Refuse what is known not to work, before anything is built. Raises `UserError`."""
    if ranks > config.global_batch_size:
        raise UserError(
            f"train.global_batch_size = {config.global_batch_size} leaves some of {ranks} ranks without a sample; "
            f"add train.global_batch_size={ranks}, or use fewer ranks"
        )
    if config.strategy != "ddp" and config.global_batch_size % ranks:
        raise UserError(
            f"train.strategy={config.strategy} needs the same number of samples on each rank: "
            f"train.global_batch_size = {config.global_batch_size} is not a multiple of {ranks} ranks"
        )
    if config.fsdp_shard_ranks and config.strategy != "fsdp":
        raise UserError(f"train.fsdp_shard_ranks needs train.strategy=fsdp, not {config.strategy}")
    if ranks > config.fsdp_shard_ranks > 0 and ranks % config.fsdp_shard_ranks:
        raise UserError(
            f"train.fsdp_shard_ranks = {config.fsdp_shard_ranks}: {ranks} ranks are no whole number of such groups; "
            "use the number of ranks per node, or 0"
        )
    if config.deterministic_reduction and (
        config.strategy != "ddp" or config.micro_batch_size != 1
    ):
        raise UserError(
            "train.deterministic_reduction needs train.strategy=ddp and train.micro_batch_size=1: "
            "it adds gradients sample by sample"
        )
    if config.channels_last and config.strategy != "ddp":
        raise UserError(
            f"train.channels_last works with strategy ddp only: {config.strategy} cuts contiguous parameters"
        )
    if config.precision == "fp16" and config.strategy != "ddp":
        raise UserError(
            f"train.precision=fp16 works with strategy ddp only, not {config.strategy}; use bf16"
        )
    if config.precision == "tf32" and device.type != "cuda":
        raise UserError("train.precision=tf32 needs an NVIDIA GPU; use fp32 on a CPU")
    if config.compile and config.strategy == "fsdp":
        raise UserError(
            "train.compile works with strategies ddp and deepspeed, not fsdp: torch 2.13 fails to compile what it "
            "gathers; deepspeed with zero_stage=3 cuts the same state"
        )
    if config.ema_decay and config.strategy == "deepspeed" and config.zero_stage == 3:
        raise UserError(
            "train.ema_decay with DeepSpeed ZeRO 3: no rank holds the weights to average; use zero_stage 2"
        )
    tuned = config.fine_tune.freeze != "none" or config.fine_tune.layer_decay != 1
    if tuned and config.strategy == "deepspeed" and config.zero_stage > 0:
        raise UserError(
            "train.fine_tune works with strategies ddp and fsdp and with DeepSpeed's zero_stage 0: from stage 1 on "
            "DeepSpeed cuts all parameters as one group"
        )
    if config.offload_optimizer and config.zero_stage == 2 and config.on_nonfinite == "skip":
        raise UserError(
            "train.on_nonfinite=skip with train.offload_optimizer and zero_stage 2: DeepSpeed would carry the bad "
            "gradient into the next step; use zero_stage 1 or 3"
        )
    if config.offload_optimizer and (config.strategy != "deepspeed" or config.zero_stage == 0):
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
    """The model on its device, spread as `train.strategy` says, with its optimizer.

    `parameter_groups(model)` names the optimizer's groups; it is called once the parameters have their final form.
    """
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    model.set_checkpointing(checkpointed_levels)  # type: ignore[operator]
    if config.compile:
        model.compile()
    broadcast_module(model)
    ranks = world_size()
    if config.strategy == "deepspeed":
        return DeepSpeedStrategy(model, build_optimizer(config, parameter_groups(model)), config)
    if config.strategy == "fsdp" and ranks > 1:
        apply_fully_shard(model, config.fsdp_shard_ranks)
        kind: type[Strategy] = FullyShard
    else:
        kind = DeterministicReduction if config.deterministic_reduction else DataParallel
    optimizer = build_optimizer(config, parameter_groups(model))
    return kind(model, optimizer, config.clip_grad_norm, config.precision)


def build_optimizer(config: TrainConfig, groups: Iterable[dict]) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum (nnU-Net's), or AdamW. The learning rate is set anew at each step."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups,
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
