"""Memory that a rank needs for a training step, part by part, and whether that fits. Pure functions of settings.

Activations come from walking through the step (`model.footprint`); what a strategy holds is arithmetic, with P numbers
of 4 bytes, W ranks and k optimizer tensors (SGD with momentum 1, AdamW 2):

  ddp           P weights, P gradients (DDP's buckets), k P optimizer state
  fsdp          a W-th of each (W: fsdp_shard_ranks where set); two groups gathered at a time, and the gradients of two
  deepspeed 0   as ddp, and its exchange buffer
  deepspeed 1   P weights, P gradients; a W-th of optimizer state and of the copied weights; exchange buffer
  deepspeed 2   P weights; a W-th of gradients, optimizer state and copied weights; exchange buffer
  deepspeed 3   a W-th of everything; up to P gathered; exchange buffer

(https://arxiv.org/abs/1910.02054, section 5; https://arxiv.org/abs/2304.11277.)
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

from liverseg_dist.config import Settings, TrainConfig
from liverseg_dist.distributed.strategies.deepspeed import BUCKET
from liverseg_dist.model.memory_trace import Footprint, TraceOptions, trace_memory

GIB = 2**30
BYTES = 4
CONTEXT_GIB = 0.75
"""CUDA's context and library workspaces: a usual size, not measured by us (no GPU was there)."""
ALLOCATOR_OVERHEAD = 0.08
"""Share of the tensors that the allocator loses to gaps."""

_trace = lru_cache(maxsize=512)(trace_memory)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for. `levels` are recomputed in backward."""

    parts: dict[str, int]
    levels: tuple[int, ...]
    flops: int
    """Of one micro-batch, forward and backward."""

    @property
    def gib(self) -> float:
        return sum(self.parts.values()) / GIB

    def explain(self) -> str:
        return " + ".join(
            f"{name} {size / GIB:.2f}" for name, size in self.parts.items() if size >= 0.005 * GIB
        )


def estimate_memory(
    settings: Settings, ranks: int = 1, device: str = "cuda", levels: Collection[int] = ()
) -> MemoryEstimate:
    """For settings whose topology is filled in. `device`: cpu or cuda (none has to be there)."""
    train = settings.train
    found = trace_micro_batch(settings, ranks, device, levels)
    parts = state_bytes(train, found.parameters, found.largest_group, ranks)
    # The update works after backward: its temporaries take the place of the activations.
    update = (
        2 * BYTES * found.parameters // optimizer_shards(train, ranks) if device != "cpu" else 0
    )
    parts["activations"] = max(found.peak, update)
    tensors = sum(parts.values())
    margin = settings.memory.margin_gib
    parts["margin"] = (
        int(CONTEXT_GIB * GIB + ALLOCATOR_OVERHEAD * tensors)
        if margin is None
        else int(margin * GIB)
    )
    return MemoryEstimate(parts, tuple(sorted(levels)), found.flops)


def trace_micro_batch(
    settings: Settings, ranks: int = 1, device: str = "cuda", levels: Collection[int] = ()
) -> Footprint:
    """The footprint of a rank's micro-batch; found once for each step of its kind."""
    train = settings.train
    walk = TraceOptions(
        tuple(sorted(levels)), train.precision, device, train.channels_last, settings.loss
    )
    return _trace(settings.model, settings.data.patch_size, micro_batch(train, ranks), walk)


def micro_batch(train: TrainConfig, ranks: int) -> int:
    """Samples that a rank really computes at once."""
    return min(train.micro_batch_size, -(-train.global_batch_size // ranks))


def optimizer_shards(train: TrainConfig, ranks: int) -> int:
    """Into how many parts the optimizer's state is cut."""
    if train.strategy == "fsdp":
        return min(ranks, train.fsdp_shard_ranks or ranks)
    return ranks if train.strategy == "deepspeed" and train.zero_stage else 1


def state_bytes(
    train: TrainConfig, parameters: int, largest_group: int, ranks: int
) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer state and exchange buffers on each of `ranks` ranks."""
    whole, shard = BYTES * parameters, -(-BYTES * parameters // optimizer_shards(train, ranks))
    tensors = 2 if train.optimizer == "adamw" else int(train.momentum > 0)
    stage = train.zero_stage if train.strategy == "deepspeed" else None
    fsdp = train.strategy == "fsdp" and ranks > 1
    parts = {"weights": whole, "gradients": whole, "optimizer": tensors * whole}
    if fsdp:
        parts = {"weights": shard, "gradients": shard, "optimizer": tensors * shard}
        parts["exchange"] = 4 * BYTES * largest_group
    if stage is not None:
        parts["exchange"] = BYTES * min(BUCKET, parameters) if stage == 0 else BYTES * BUCKET
    if stage:
        parts["optimizer"] = (tensors + 1) * shard
        parts["gradients"] = whole if stage == 1 else shard
        if train.offload_optimizer:
            parts["optimizer"] = 0
    if stage == 3:
        parts["weights"] = shard + whole
    if train.deterministic_reduction:  # every micro-batch's gradients are kept, and their sum
        samples = -(-train.global_batch_size // ranks)
        parts["gradients"] += whole * (samples + 1 + (ranks if ranks > 1 else 0))
    if train.ema_decay:
        parts["average"] = shard if fsdp else whole
    return parts
