"""Cases among several workers: who takes which, and how a failed one is told."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from liverseg_dist.data.findings import ScanFileError
from liverseg_dist.errors import RunFailed, UserError


def shard_cases(voxels: Mapping[str, int], shard: int, num_shards: int) -> list[str]:
    """The cases of one shard, largest first: each case goes to the shard that has least so far.

    (Graham's longest-processing-time rule: never more than a third longer than the best division.) Every shard works
    the whole division out for itself, so nobody waits for a claim of one that died.
    """
    loads = [0] * num_shards
    mine = []
    for case_id in sorted(voxels, key=lambda name: (-voxels[name], name)):
        lightest = loads.index(min(loads))
        loads[lightest] += voxels[case_id]
        if lightest == shard:
            mine.append(case_id)
    return mine


SERIAL_SHARE = 0.2
"""Part of a case's CPU time that is not shared: reading, restoring, scoring, drawing. 0.26 with the tiny network of the
demo, less with larger ones."""


@dataclass(frozen=True)
class WorkDivision:
    """`together`: cases whose windows all processes compute side by side, first and largest first; `alone`: the whole
    cases of this process."""

    together: tuple[str, ...]
    alone: tuple[str, ...]


def divide_work(voxels: Mapping[str, int], shard: int, num_shards: int) -> WorkDivision:
    """What this process does, such that the last one ends soonest: the largest cases together, all others whole.

    Whole cases lose nothing to waiting, but the largest, or the last of a few, can keep one process busy while the
    others have nothing left. So every number of largest cases to share is tried against the time it would take.
    """
    order = sorted(voxels, key=lambda name: (-voxels[name], name))
    ends = []
    for number in range(len(order) + 1 if num_shards > 1 else 1):
        whole = {name: voxels[name] for name in order[number:]}
        loads = [
            sum(voxels[name] for name in shard_cases(whole, one, num_shards))
            for one in range(num_shards)
        ]
        shared = sum(voxels[name] for name in order[:number])
        ends.append(shared * (SERIAL_SHARE + (1 - SERIAL_SHARE) / num_shards) + max(loads))
    together = order[: ends.index(min(ends))]
    rest = {name: voxels[name] for name in order[len(together) :]}
    return WorkDivision(tuple(together), tuple(shard_cases(rest, shard, num_shards)))


def format_failure(name: str, error: Exception) -> str:
    """One line that names the case or file and what went wrong. It is kept with results, which others come to see: of
    the scan's own path only its last part is told."""
    if isinstance(error, ScanFileError):
        text = (
            error.reason
            if error.path.name == Path(name).name
            else f"{error.path.name}: {error.reason}"
        )
    elif isinstance(error, (UserError, RunFailed)):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"{Path(error.filename or name).name}: {error.strerror}"
    elif isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        text = "out of memory; set inference.batch_size=1, or use --device cpu"
    else:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return text if name in text else f"{name}: {text}"
