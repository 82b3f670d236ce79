"""Divide cases among processes, and format the failure of a case as one line.

Used by the commands `predict`, `evaluate` and `postprocess`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from liverseg_dist.data.findings import ScanFileError
from liverseg_dist.errors import RunFailed, UserError

MAX_REASON_CHARACTERS = 300

SERIAL_SHARE = 0.2
"""Part of a case's CPU time that is not shared among processes: reading, resampling, scoring and
drawing. Measured: 0.26 with the small network of the demo, less with larger networks."""


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
    loads = [0] * num_shards
    selected = []
    for case_id in _sort_by_size(voxels):
        lightest = loads.index(min(loads))
        loads[lightest] += voxels[case_id]
        if lightest == shard:
            selected.append(case_id)
    return selected


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
    # A single process has no others to share with.
    most_shared = len(order) if num_shards > 1 else 0
    durations = []
    for number in range(most_shared + 1):
        whole_voxels = {name: voxels[name] for name in order[number:]}
        shared_voxels = sum(voxels[name] for name in order[:number])
        shared_duration = shared_voxels * (SERIAL_SHARE + (1 - SERIAL_SHARE) / num_shards)
        durations.append(shared_duration + _find_largest_load(whole_voxels, num_shards))
    number = durations.index(min(durations))
    whole_voxels = {name: voxels[name] for name in order[number:]}
    return WorkDivision(tuple(order[:number]), tuple(shard_cases(whole_voxels, shard, num_shards)))


def _sort_by_size(voxels: Mapping[str, int]) -> list[str]:
    """Largest first; the name decides between equals, so that all processes agree."""
    return sorted(voxels, key=lambda name: (-voxels[name], name))


def _find_largest_load(voxels: Mapping[str, int], num_shards: int) -> int:
    """Voxels of the shard that has most."""
    largest = 0
    for shard in range(num_shards):
        load = sum(voxels[name] for name in shard_cases(voxels, shard, num_shards))
        largest = max(largest, load)
    return largest


def format_failure(name: str, error: Exception) -> str:
    """One line with the name of the case or file and the reason of its failure.

    The line is stored with the results, which are passed on to others. So it contains only the last
    part of the scan's own path: folders can contain the name of a patient.
    """
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
        reason = " ".join(str(error).split())[:MAX_REASON_CHARACTERS]
        text = f"{type(error).__name__}: {reason}"
    return text if name in text else f"{name}: {text}"
