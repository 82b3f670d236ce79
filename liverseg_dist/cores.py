"""How many CPU cores this process may use, and how threads wait for each other.

`usable_cores` is the upper limit for every default number of threads. Containers limit CPU time by
a cgroup quota that neither `os.cpu_count` nor the CPU affinity shows: with a quota of two cores on
a node of 64, 64 threads would be throttled for most of each period.
"""

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables by which users decide how OpenMP threads wait."""


def make_threads_wait_passively(environment: MutableMapping[str, str] | None = None) -> None:
    """Let OpenMP threads sleep at a barrier. Call before torch is imported: OpenMP reads its
    variables once.

    By default a thread that reaches a barrier spins for milliseconds. If other processes use the
    cores, it takes the time slice of the thread it waits for: with two threads on two cores and six
    other busy processes, a training step took four times as long as with one thread. Sleeping
    threads avoid this, cost no measurable time on an idle machine, and do not change results (see
    `tools/bench/threads.py`).
    """
    environment = os.environ if environment is None else environment
    if not any(name in environment for name in WAITING_VARIABLES):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


def usable_cores() -> int:
    """Return the cores of the CPU affinity, limited by a cgroup quota. At least 1."""
    visible = len(os.sched_getaffinity(0))
    quota = cgroup_quota()
    return visible if quota is None else max(1, min(visible, math.ceil(quota)))


def cgroup_quota(own: Path = OWN_CGROUP, root: Path = CGROUPS) -> float | None:
    """Return the CPU quota of this process in cores: the smallest of its cgroup and all parents.

    Args:
        own: lists the cgroups of this process, as /proc/self/cgroup (versions 1 and 2).
        root: where the cgroup file systems are mounted.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    quotas: list[float] = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            base, read_quota = root, _read_quota_v2
        elif "cpu" in controllers.split(","):
            base, read_quota = root / "cpu", _read_quota_v1
        else:
            continue
        # In a container the listed path may be that of the host; the mount is then the container's
        # own group.
        group = base / name.strip("/")
        for folder in (group, *group.parents):
            quota = read_quota(folder)
            if quota is not None:
                quotas.append(quota)
            if folder == base:
                break
    return min(quotas, default=None)


def _read_quota_v2(folder: Path) -> float | None:
    """From `cpu.max`: "max 100000" or "150000 100000" (microseconds of CPU time per period)."""
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _read_quota_v1(folder: Path) -> float | None:
    """From `cpu.cfs_quota_us` (-1: none) and `cpu.cfs_period_us`."""
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        period = int((folder / "cpu.cfs_period_us").read_text(encoding="utf-8"))
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
