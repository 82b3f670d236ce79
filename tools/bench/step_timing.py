"""Time and peak memory of a repeated call, the same way on a CPU and on a GPU. Used by the benchmarks of steps.

On a CPU a duration is CPU time of this process, because other jobs share the cores. On a GPU it is
the time between two events of the stream: the host may run ahead, as in training, and is not made
to wait after each call.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from liverseg_dist.model.memory_trace import LiveBytes


@dataclass(frozen=True)
class Timing:
    """Durations of a repeated call."""

    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def least_s(self) -> float:
        return min(self.seconds)


def time_calls(call: Callable[[], object], count: int, device: torch.device) -> Timing:
    """Time `count` calls. The caller warms up first."""
    if device.type != "cuda":
        spent = []
        for _ in range(count):
            started = time.process_time()
            call()
            spent.append(time.process_time() - started)
        return Timing(tuple(spent))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    seconds = [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(events)]
    return Timing(tuple(seconds))


def measure_peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of tensors that `call` has alive beyond those that exist before it."""
    if device.type != "cuda":
        with LiveBytes() as counter:
            call()
        return counter.peak
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def free_device_memory(device: torch.device) -> None:
    """Return the memory of deleted models to the device, so that the next one starts alike."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_resident_gib(reset: bool = False) -> float:
    """Return this process's peak of resident memory since its start or the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
