"""Time of a training step on many GPUs, from one GPU's step and what is exchanged. Pure arithmetic.

  step(N) = compute * (1 + spread * sqrt(2 ln N)) + exchange that backward and forward cannot hide

An all-reduce of V bytes over m nodes of g GPUs each: 2 (g-1)/g V / intra + 2 (m-1)/m V / inter, and per message a
latency for each hop, 2 (g-1) inside and 2 log2(m) between nodes (NCCL's hierarchical ring and tree,
https://arxiv.org/abs/1909.09756 and https://developer.nvidia.com/blog/massively-scale-deep-learning-training-nccl-2-4/).
A reduce-scatter or an all-gather is half of that. The slowest of N ranks sets the pace: the expected maximum of N
normal variables lies sqrt(2 ln N) standard deviations up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

BYTES = 4
BACKWARD = 2 / 3
"""Share of a step's compute; gradients are exchanged meanwhile."""
MLPERF_U_NET3D = {8: 71.1, 16: 65.1, 72: 62.7}
"""Published MLPerf training figures: samples/s per H100, by the number of GPUs."""


@dataclass(frozen=True)
class Machine:
    """What joins the ranks. Bandwidths in GB/s (10^9 bytes per second), one way; `inter` is a whole node's."""

    gpus_per_node: int = 8
    intra_gb_s: float = 300.0
    inter_gb_s: float = 50.0
    intra_latency_us: float = 5.0
    inter_latency_us: float = 15.0
    spread: float = 0.01
    """Standard deviation of a rank's step time over its mean."""
    overlap: bool = True
    """Whether exchange runs beside compute (NCCL on its own stream; with gloo it takes the same core)."""


@dataclass(frozen=True)
class Prediction:
    gpus: int
    step_s: float
    exposed_s: float
    """Exchange that compute does not hide."""
    waiting_s: float
    """For the slowest rank."""
    efficiency: float
    """Throughput per GPU over that of one GPU, the batch per GPU staying the same."""


def collective_s(volume: float, messages: int, ranks: int, machine: Machine) -> float:
    """Seconds of a reduce-scatter or an all-gather of `volume` bytes in `messages` parts; an all-reduce is two."""
    if ranks == 1:
        return 0.0
    inside = min(ranks, machine.gpus_per_node)
    nodes = math.ceil(ranks / machine.gpus_per_node)
    seconds = (inside - 1) / inside * volume / (machine.intra_gb_s * 1e9)
    seconds += messages * (inside - 1) * machine.intra_latency_us * 1e-6
    if nodes > 1:
        seconds += (nodes - 1) / nodes * volume / (machine.inter_gb_s * 1e9)
        seconds += messages * math.log2(nodes) * machine.inter_latency_us * 1e-6
    return seconds


def predict_step_time(
    strategy: str, compute_s: float, parameters: int, groups: int, ranks: int, machine: Machine
) -> Prediction:
    """`strategy`: one of `STRATEGIES`. `compute_s`: one GPU's step; `groups`: messages per pass."""
    volume = BYTES * float(parameters)
    once = collective_s(volume, groups, ranks, machine)
    backward = BACKWARD * compute_s if machine.overlap else 0.0
    forward = (1 - BACKWARD) * compute_s if machine.overlap else 0.0
    last = 2 * once / groups  # the last message of backward has nothing left to hide behind
    if strategy == "ddp":
        exposed = max(last, 2 * once - backward)
    elif strategy == "fsdp":  # gather in forward; gather again and scatter in backward
        exposed = once / groups + max(0.0, once - forward) + max(last / 2, 2 * once - backward)
    elif (
        strategy == "fsdp in nodes"
    ):  # gathers stay inside; the gradients' shards are then summed over the nodes
        inside = collective_s(volume, groups, min(ranks, machine.gpus_per_node), machine)
        exposed = (
            inside / groups
            + max(0.0, inside - forward)
            + max(last - inside / groups, 2 * once - backward)
        )
    elif (
        strategy == "deepspeed3"
    ):  # as fsdp, but the gradients' exchange waits for the end of backward
        exposed = once / groups + max(0.0, once - forward) + max(0.0, once - backward) + once
    else:  # gradients after backward, then (from stage 1) the updated weights: an all-reduce's volume all the same
        exposed = 2 * once
    if ranks == 1:
        exposed = 0.0
    waiting = compute_s * machine.spread * math.sqrt(2 * math.log(ranks))
    step = compute_s + exposed + waiting
    return Prediction(ranks, step, exposed, waiting, compute_s / step)


STRATEGIES = (
    "ddp",
    "fsdp",
    "fsdp in nodes",
    "deepspeed0",
    "deepspeed1",
    "deepspeed2",
    "deepspeed3",
)
"""fsdp in nodes: train.fsdp_shard_ranks is the GPUs of a node."""


def scaling_table(
    compute_s: float, parameters: int, groups: int, machine: Machine, gpus: Sequence[int]
) -> dict[str, list[Prediction]]:
    """Predictions per strategy for these numbers of GPUs."""
    return {
        name: [predict_step_time(name, compute_s, parameters, groups, n, machine) for n in gpus]
        for name in STRATEGIES
    }
