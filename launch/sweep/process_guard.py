"""Sees to it that Ray's processes end with the driver, even when the driver is killed with SIGKILL.

Ray ties its servers to the driver, but its agents can outlive them, waiting for a server that is gone. The guard is a
process of its own that keeps a list of the driver's descendants; when the pipe from the driver breaks, it kills those
left. Folds in training are spared: they have got SIGTERM by then, save, and end by themselves. A driver that ended
without a word (killed; Ray itself ends it when its control process is gone) gets one from here.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

INTERVAL_S = 1.0
GRACE_S = 5.0
"""What ends by itself within this time after the driver, may."""
CLEAN_EXIT = b"."
"""What a driver says that leaves in order."""
Processes = dict[int, int]
"""Process id -> start time in clock ticks: together they name a process for good."""


def list_descendants(root: int) -> Processes:
    """All living processes below `root`, read from /proc."""
    children: dict[int, list[int]] = {}
    started: Processes = {}
    for entry in Path("/proc").glob("[0-9]*"):
        found = _stat(int(entry.name))
        if found is not None:
            parent, start = found
            children.setdefault(parent, []).append(int(entry.name))
            started[int(entry.name)] = start
    below: Processes = {}
    queue = list(children.get(root, ()))
    while queue:
        pid = queue.pop()
        below[pid] = started[pid]
        queue += children.get(pid, ())
    return below


def still_alive(processes: Processes) -> list[int]:
    """Those that live yet; zombies do not."""
    return [
        pid
        for pid, start in processes.items()
        if (found := _stat(pid)) is not None and found[1] == start
    ]


def _stat(pid: int) -> tuple[int, int] | None:
    """(parent, start time) of a living process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (int(fields[1]), int(fields[19]))


def _trains(pid: int) -> bool:
    try:
        return b"liverseg_dist\0train" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@contextlib.contextmanager
def guard_processes() -> Iterator[Callable[[], None]]:
    """While the block runs, and after it however it ends, the guard watches this process. Yields what tells it that
    this process has given its reasons itself, should it end within the block."""
    process = subprocess.Popen(
        [sys.executable, "-I", str(Path(__file__).resolve()), str(os.getpid())],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    pipe = process.stdin

    def farewell() -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):
            pipe.write(CLEAN_EXIT)
            pipe.close()

    try:
        yield farewell
    finally:
        farewell()
        process.wait()


def main(driver: int) -> None:
    known: Processes = {}
    while not select.select([0], [], [], INTERVAL_S)[0]:
        below = list_descendants(driver)
        below.pop(os.getpid(), None)
        known = {
            pid: start
            for pid, start in {**known, **below}.items()
            if pid in below or still_alive({pid: start})
        }
    if os.read(0, 1) != CLEAN_EXIT:
        said = "launch: this process was killed, or Ray has ended it; all is kept, run the same line again to continue"
        with contextlib.suppress(OSError):
            print(said, file=sys.stderr, flush=True)
    end = time.monotonic() + GRACE_S
    while (
        left := [pid for pid in still_alive(known) if not _trains(pid)]
    ) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
