"""Cases among several workers: who takes which, and how a failed one is told."""

from collections.abc import Mapping

from liverseg_dist.errors import RunFailed, UserError


def share(voxels: Mapping[str, int], shard: int, num_shards: int) -> list[str]:
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


def failure_line(name: str, error: Exception) -> str:
    """One line that names the case or file and what went wrong."""
    if isinstance(error, (UserError, RunFailed)):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or name}: {error.strerror}"
    elif isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        text = "out of memory; set inference.batch_size=1, or use --device cpu"
    else:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return text if name in text else f"{name}: {text}"
