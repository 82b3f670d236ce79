"""Time of a training step on many GPUs, from the time on one GPU and the exchanged bytes.

  step(N) = compute * (1 + spread * sqrt(2 ln N)) + exchange that does not overlap

An all-reduce of V bytes over m nodes of g GPUs each takes 2 (g-1)/g V / intra + 2 (m-1)/m V /
inter, and per message a latency for each hop, 2 (g-1) inside a node and 2 log2(m) between nodes
(NCCL's hierarchical ring and tree, https://arxiv.org/abs/1909.09756 and
https://developer.nvidia.com/blog/massively-scale-deep-learning-training-nccl-2-4/). A
reduce-scatter or an all-gather takes half of that. The slowest of N ranks determines the time: the
expected maximum of N normal variables is about sqrt(2 ln N) standard deviations above the mean.

Used by `liverseg plan`. Pure arithmetic.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from liverseg_dist.config.registry import find_registered

BYTES = 4
BACKWARD = 2 / 3
"""Share of a step's compute time; gradients are exchanged at the same time."""
MLPERF_U_NET3D = {8: 71.1, 16: 65.1, 72: 62.7}
"""Published MLPerf training figures: samples/s per H100, by the number of GPUs."""


@dataclass(frozen=True)
class Machine:
    """Connections between ranks.

    Bandwidths are in GB/s (10^9 bytes per second), in one direction; `inter` is that of a node.
    """

    gpus_per_node: int = 8
    intra_gb_s: float = 300.0
    inter_gb_s: float = 50.0
    intra_latency_us: float = 5.0
    inter_latency_us: float = 15.0
    spread: float = 0.01
    """Standard deviation of a rank's step time, relative to its mean."""
    overlap: bool = True
    """Whether exchange and compute overlap.

    NCCL uses a stream of its own; gloo uses the same CPU core.
    """


@dataclass(frozen=True)
class Prediction:
    """Predicted time of a step."""

    gpus: int
    step_s: float
    exposed_s: float
    """Exchange that does not overlap with compute."""
    waiting_s: float
    """Time for which the mean rank waits for the slowest one."""
    efficiency: float
    """Throughput per GPU relative to one GPU, with the same batch per GPU."""


def collective_s(volume: float, messages: int, ranks: int, machine: Machine) -> float:
    """Return the seconds of a reduce-scatter or an all-gather; an all-reduce takes twice as long.

    Args:
        volume: bytes.
        messages: number of messages into which the bytes are divided.
        ranks: number of ranks.
        machine: connections between ranks.
    """
    if ranks == 1:
        return 0.0
    inside = min(ranks, machine.gpus_per_node)
    # Ranks fill one node after another.
    nodes = math.ceil(ranks / machine.gpus_per_node)
    seconds = (inside - 1) / inside * volume / (machine.intra_gb_s * 1e9)
    seconds += messages * (inside - 1) * machine.intra_latency_us * 1e-6
    if nodes > 1:
        seconds += (nodes - 1) / nodes * volume / (machine.inter_gb_s * 1e9)
        seconds += messages * math.log2(nodes) * machine.inter_latency_us * 1e-6
    return seconds


@dataclass(frozen=True)
class _Exchange:
    """Times in seconds from which a strategy's exposed exchange follows."""

    once: float
    """One reduce-scatter or all-gather of all parameters over all ranks."""
    in_node: float
    """The same over the ranks of one node."""
    last_message: float
    """All-reduce of the last message of backward, with which no compute can overlap."""
    groups: int
    """Messages per pass."""
    forward: float
    """Compute time of forward that can overlap with exchange."""
    backward: float
    """Compute time of backward that can overlap with exchange."""


def _exposed_ddp(time: _Exchange) -> float:
    # The last bucket becomes ready only when backward has ended.
    return max(time.last_message, 2 * time.once - time.backward)


def _exposed_fsdp(time: _Exchange) -> float:
    """Gather in forward; gather again and scatter in backward."""
    # The first group must arrive before any computation can start.
    gather = time.once / time.groups + max(0.0, time.once - time.forward)
    return gather + max(time.last_message / 2, 2 * time.once - time.backward)


def _exposed_fsdp_in_nodes(time: _Exchange) -> float:
    """Gather inside nodes; then sum the shards of the gradients over the nodes."""
    first_gather = time.in_node / time.groups
    gather = first_gather + max(0.0, time.in_node - time.forward)
    return gather + max(time.last_message - first_gather, 2 * time.once - time.backward)


def _exposed_zero3(time: _Exchange) -> float:
    """As FSDP, but the gradients are exchanged after backward."""
    gather = time.once / time.groups + max(0.0, time.once - time.forward)
    return gather + max(0.0, time.once - time.backward) + time.once


def _exposed_zero(time: _Exchange) -> float:
    """Exchange gradients after backward and (from stage 1) weights: the bytes of an all-reduce."""
    return 2 * time.once


EXPOSED_EXCHANGE: dict[str, Callable[[_Exchange], float]] = {
    "ddp": _exposed_ddp,
    "fsdp": _exposed_fsdp,
    "fsdp in nodes": _exposed_fsdp_in_nodes,
    "deepspeed0": _exposed_zero,
    "deepspeed1": _exposed_zero,
    "deepspeed2": _exposed_zero,
    "deepspeed3": _exposed_zero3,
}
"""Exposed exchange by strategy; fsdp in nodes: train.fsdp_shard_ranks is the GPUs of a node."""
STRATEGIES = tuple(EXPOSED_EXCHANGE)


def predict_step_time(
    strategy: str, compute_s: float, parameters: int, groups: int, ranks: int, machine: Machine
) -> Prediction:
    """Predict the time of a step.

    Args:
        strategy: one of `STRATEGIES`.
        compute_s: time of a step on one GPU.
        parameters: number of parameters of the network.
        groups: messages per pass.
        ranks: number of GPUs.
        machine: connections between ranks.

    Raises:
        UserError: unknown strategy.
    """
    exposed_exchange = find_registered(EXPOSED_EXCHANGE, strategy, "strategy")
    volume = BYTES * float(parameters)
    once = collective_s(volume, groups, ranks, machine)
    time = _Exchange(
        once=once,
        in_node=collective_s(volume, groups, min(ranks, machine.gpus_per_node), machine),
        last_message=2 * once / groups,
        groups=groups,
        forward=(1 - BACKWARD) * compute_s if machine.overlap else 0.0,
        backward=BACKWARD * compute_s if machine.overlap else 0.0,
    )
    # One GPU has no exchange.
    exposed = 0.0 if ranks == 1 else exposed_exchange(time)
    # With one rank the logarithm is 0: no waiting.
    waiting = compute_s * machine.spread * math.sqrt(2 * math.log(ranks))
    step = compute_s + exposed + waiting
    return Prediction(ranks, step, exposed, waiting, compute_s / step)


def scaling_table(
    compute_s: float, parameters: int, groups: int, machine: Machine, gpus: Sequence[int]
) -> dict[str, list[Prediction]]:
    """Return predictions for each strategy and these numbers of GPUs."""
    table = {}
    for name in STRATEGIES:
        table[name] = [
            predict_step_time(name, compute_s, parameters, groups, count, machine) for count in gpus
        ]
    return table
