"""Memory that a rank needs for a training step. Pure functions of the settings.

Activations are measured by `model.memory_trace`. The state of a strategy is arithmetic, with P
parameters of 4 bytes, W ranks and k optimizer tensors (SGD with momentum 1, AdamW 2):

  ddp           P weights, P gradients (DDP's buckets), k P optimizer state
  fsdp          1/W of each (W: fsdp_shard_ranks if set); two gathered groups and their gradients,
                or all gathered groups with fsdp_reshard_after_forward=false; P gradients more where
                micro-batches are accumulated
  deepspeed 0   as ddp, and an exchange buffer
  deepspeed 1   P weights, P gradients; 1/W of optimizer state and weight copies; exchange buffer
  deepspeed 2   P weights; 1/W of gradients, optimizer state and weight copies; exchange buffer
  deepspeed 3   1/W of everything; up to P gathered; exchange buffer

(https://arxiv.org/abs/1910.02054, section 5; https://arxiv.org/abs/2304.11277.)
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

from liverseg_dist.config import Settings, TrainConfig
from liverseg_dist.config.registry import find_registered
from liverseg_dist.distributed.strategies.deepspeed import BUCKET
from liverseg_dist.distributed.strategies.optimizers import find_optimizer
from liverseg_dist.model.memory_trace import Footprint, TraceOptions, trace_memory

GIB = 2**30
BYTES = 4
CONTEXT_GIB = 0.75
"""CUDA's context and library workspaces: a usual size, not a measurement of this project."""
ALLOCATOR_OVERHEAD = 0.08
"""Share of the tensors' bytes that the allocator loses to gaps."""

# The search for fitting settings asks for the same step many times.
_trace_memory_cached = lru_cache(maxsize=512)(trace_memory)


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of a rank in a training step."""

    parts: dict[str, int]
    """Bytes by purpose."""
    levels: tuple[int, ...]
    """Levels whose activations are recomputed in backward."""
    flops: int
    """Operations of forward and backward of one micro-batch."""

    @property
    def gib(self) -> float:
        """Sum of all parts in GiB."""
        return sum(self.parts.values()) / GIB

    def describe_parts(self) -> str:
        """Return the parts in GiB as a sum; parts that round to 0.00 are left out."""
        texts = []
        for name, size in self.parts.items():
            if size >= 0.005 * GIB:
                texts.append(f"{name} {size / GIB:.2f}")
        return " + ".join(texts)


def estimate_memory(
    settings: Settings, ranks: int = 1, device: str = "cuda", levels: Collection[int] = ()
) -> MemoryEstimate:
    """Estimate the memory of a rank.

    Args:
        settings: settings with the network's topology filled in.
        ranks: number of ranks.
        device: cpu or cuda; the device need not exist.
        levels: levels whose activations are recomputed in backward.
    """
    train = settings.train
    footprint = trace_micro_batch(settings, ranks, device, levels)
    parts = state_bytes(train, footprint.parameters, footprint.largest_group, ranks)
    # The optimizer step runs after backward: its temporaries use the memory of the activations.
    update = 0
    if device != "cpu":
        update = 2 * BYTES * footprint.parameters // optimizer_shards(train, ranks)
    parts["activations"] = max(footprint.peak, update)
    margin = settings.memory.margin_gib
    # A measured margin is better than the assumption, so the setting replaces it.
    if margin is None:
        parts["margin"] = int(CONTEXT_GIB * GIB + ALLOCATOR_OVERHEAD * sum(parts.values()))
    else:
        parts["margin"] = int(margin * GIB)
    return MemoryEstimate(parts, tuple(sorted(levels)), footprint.flops)


def trace_micro_batch(
    settings: Settings, ranks: int = 1, device: str = "cuda", levels: Collection[int] = ()
) -> Footprint:
    """Measure a rank's micro-batch; results are cached.

    The arguments are those of `estimate_memory`.
    """
    train = settings.train
    options = TraceOptions(
        tuple(sorted(levels)), train.precision, device, train.channels_last, settings.loss
    )
    return _trace_memory_cached(
        settings.model, settings.data.patch_size, micro_batch(train, ranks), options
    )


def micro_batch(train: TrainConfig, ranks: int) -> int:
    """Return the samples that a rank computes at once.

    It is less than the setting if the rank's share of the global batch is smaller.
    """
    # Rounded up: the rank with the largest share decides the memory.
    return min(train.micro_batch_size, -(-train.global_batch_size // ranks))


def optimizer_shards(train: TrainConfig, ranks: int) -> int:
    """Return the number of shards of the optimizer's state.

    Raises:
        UserError: unknown strategy.
    """
    shards = {
        "ddp": 1,
        "fsdp": min(ranks, train.fsdp_shard_ranks or ranks),
        "deepspeed": ranks if train.zero_stage else 1,
    }
    return find_registered(shards, train.strategy, "train.strategy")


def _fsdp_exchange_bytes(
    train: TrainConfig, parameters: int, largest_group: int, ranks: int
) -> int:
    """Return the bytes of gathered parameters and complete gradients; arguments: `state_bytes`."""
    gathered_bytes = 2 if train.precision == "bf16" else BYTES
    gradient_bytes = 2 if train.reduce_precision == "bf16" else BYTES
    # Two groups of each: one is used while the next is exchanged.
    gathered, gradients = 2 * largest_group, 2 * largest_group
    if not train.fsdp_reshard_after_forward:
        gathered = parameters
    # Ranks exchange gradients in the last micro-batch; until then each keeps its own, complete.
    if train.global_batch_size > ranks * train.micro_batch_size:
        gradients += parameters
    return gathered_bytes * gathered + gradient_bytes * gradients


def state_bytes(
    train: TrainConfig, parameters: int, largest_group: int, ranks: int
) -> dict[str, int]:
    """Return the bytes of weights, gradients, optimizer state and exchange buffers of a rank.

    Args:
        train: settings `train.*`.
        parameters: number of parameters of the network.
        largest_group: parameters of the largest group that FSDP gathers at once.
        ranks: number of ranks.
    """
    whole = BYTES * parameters
    shard = -(-whole // optimizer_shards(train, ranks))
    # The optimizer knows its own state, so that a new one needs no change here.
    tensors = len(find_optimizer(train).configured_state_keys(train))
    stage = train.zero_stage if train.strategy == "deepspeed" else None
    fsdp = train.strategy == "fsdp" and ranks > 1
    parts = {"weights": whole, "gradients": whole, "optimizer": tensors * whole}
    if fsdp:
        parts = {"weights": shard, "gradients": shard, "optimizer": tensors * shard}
        parts["exchange"] = _fsdp_exchange_bytes(train, parameters, largest_group, ranks)
    if stage is not None:
        parts["exchange"] = BYTES * min(BUCKET, parameters) if stage == 0 else BYTES * BUCKET
    # From stage 1 on ZeRO updates a sharded copy of the weights.
    if stage:
        parts["optimizer"] = (tensors + 1) * shard
        parts["gradients"] = whole if stage == 1 else shard
        if train.offload_optimizer:
            parts["optimizer"] = 0
    if stage == 3:
        # Parameters are gathered for use and stay until they are released.
        parts["weights"] = shard + whole
    # The gradients of every micro-batch are stored, and their sum.
    if train.deterministic_reduction:
        samples = -(-train.global_batch_size // ranks)
        parts["gradients"] += whole * (samples + 1 + (ranks if ranks > 1 else 0))
    if train.ema_decay:
        parts["average"] = shard if fsdp else whole
    return parts
