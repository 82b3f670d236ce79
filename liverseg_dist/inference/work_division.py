"""Divide cases among processes, and format the failure of a case as one line.

Used by the commands `predict`, `evaluate` and `postprocess`.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from liverseg_dist.data.findings import ScanFileError
from liverseg_dist.errors import RunFailed, UserError

MAX_REASON_CHARACTERS = 300

SERIAL_SHARE = 0.2
"""Part of a case's CPU time that is not shared among processes: reading, resampling, scoring and
drawing. Measured: 0.26 with the small network of the demo, less with larger networks."""

MAX_TRIED = 256
"""Largest number of shared cases that is tried. It limits the time for sizes that differ by orders
of magnitude."""


def shard_cases(voxels: Mapping[str, int], shard: int, num_shards: int) -> list[str]:
    """The cases of one shard, largest first: each case goes to the shard with the smallest load.

    This is Graham's longest-processing-time rule: its longest shard is at most a third longer than
    that of the best division. Every shard computes the whole division itself, so no shard waits for
    another one.

    Args:
        voxels: size of each case.
        shard: number of the shard, from 0.
        num_shards: number of shards.
    """
    order = _sort_by_size(voxels)
    shards, _ = _assign_to_shards([voxels[name] for name in order], num_shards)
    return [name for name, number in zip(order, shards, strict=True) if number == shard]


def _assign_to_shards(sizes: Sequence[int], num_shards: int) -> tuple[list[int], int]:
    """Assign each case to the shard with the smallest load; the lowest number decides ties.

    Args:
        sizes: voxels of the cases, largest first.

    Returns:
        The shard of each case, and the largest load. O(n log W) for n cases and W shards.
    """
    loads = [(0, number) for number in range(num_shards)]
    shards: list[int] = []
    for size in sizes:
        load, number = loads[0]
        heapq.heapreplace(loads, (load + size, number))
        shards.append(number)
    return shards, max(load for load, _ in loads)


@dataclass(frozen=True)
class WorkDivision:
    """The work of one process.

    Attributes:
        shared: cases whose windows are divided among all processes; computed first, largest first.
        whole: cases that this process computes without the others.
    """

    shared: tuple[str, ...]
    whole: tuple[str, ...]


def divide_work(voxels: Mapping[str, int], shard: int, num_shards: int) -> WorkDivision:
    """Divide the cases so that the last process ends as early as possible.

    Whole cases lose no time to synchronisation. But the largest case, or the last of a few, can
    occupy one process while the others are idle. So the function estimates the total time for every
    number of largest cases to share, and takes the shortest one.

    Args:
        voxels: size of each case.
        shard: number of this process, from 0.
        num_shards: number of processes.
    """
    order = _sort_by_size(voxels)
    sizes = [voxels[name] for name in order]
    # A single process has no other process to share a case with.
    number = _count_shared_cases(sizes, num_shards) if num_shards > 1 else 0
    shards, _ = _assign_to_shards(sizes[number:], num_shards)
    whole = [name for name, own in zip(order[number:], shards, strict=True) if own == shard]
    return WorkDivision(tuple(order[:number]), tuple(whole))


def _count_shared_cases(sizes: Sequence[int], num_shards: int) -> int:
    """Return how many of the largest cases to share so that the total time is shortest.

    A shared case costs each process more than its part of a whole one. So the sum of this extra
    time, which grows with the number of shared cases, plus a perfect division of all work is a
    lower bound. Larger numbers are not tried once it reaches the best time found. With many more
    cases than processes that is after a few numbers.

    Args:
        sizes: voxels of the cases, largest first.
    """
    cost = SERIAL_SHARE + (1 - SERIAL_SHARE) / num_shards
    mean_load = sum(sizes) / num_shards
    best_number, best_duration, shared = 0, float("inf"), 0
    # Plus 1: 0 shared cases and all cases shared are both candidates.
    for number in range(min(len(sizes), MAX_TRIED) + 1):
        if mean_load + shared * (cost - 1 / num_shards) >= best_duration:
            break
        _, largest_load = _assign_to_shards(sizes[number:], num_shards)
        duration = shared * cost + largest_load
        if duration < best_duration:
            best_number, best_duration = number, duration
        if number < len(sizes):
            shared += sizes[number]
    return best_number


def _sort_by_size(voxels: Mapping[str, int]) -> list[str]:
    """Largest first; the name decides between equals, so that all processes agree."""
    return sorted(voxels, key=lambda name: (-voxels[name], name))


def format_failure(name: str, error: Exception) -> str:
    """One line with the name of the case or file and the reason of its failure.

    The line is stored with the results, which are passed on to others. So it contains only the last
    part of the scan's own path: folders can contain the name of a patient.
    """
    # Before UserError and OSError: only this error keeps the reason apart from the full path.
    if isinstance(error, ScanFileError):
        text = error.reason
        if error.path.name != Path(name).name:
            text = f"{error.path.name}: {error.reason}"
    elif isinstance(error, (UserError, RunFailed)):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"{Path(error.filename or name).name}: {error.strerror}"
    elif isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        text = "out of memory; set inference.batch_size=1, or use --device cpu"
    else:
        # The message of an unexpected error can have many lines; the result is one line.
        reason = " ".join(str(error).split())[:MAX_REASON_CHARACTERS]
        text = f"{type(error).__name__}: {reason}"
    return text if name in text else f"{name}: {text}"
