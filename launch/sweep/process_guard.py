"""Ends Ray's processes with the driver, also when the driver is killed with SIGKILL.

Ray ties its servers to the driver, but its agents can outlive them. The guard is a process of its
own that keeps a list of the driver's descendants. When the pipe from the driver closes, it kills
those that are left. Folds in training are not killed: they have received SIGTERM by then, save, and
end by themselves. If the driver ended without a message (it was killed, or Ray ended it because
Ray's control process is gone), the guard prints one.
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
"""Processes may end by themselves within this time after the driver."""
POLL_S = 0.1
CLEAN_EXIT = b"."
"""A driver writes this when it ends in order."""
Processes = dict[int, int]
"""Process id -> start time in clock ticks. The two identify a process; ids alone are reused."""


def list_descendants(root: int) -> Processes:
    """All living processes below `root`, read from /proc."""
    children: dict[int, list[int]] = {}
    started: Processes = {}
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        stat = _read_stat(pid)
        if stat is not None:
            parent, start = stat
            children.setdefault(parent, []).append(pid)
            started[pid] = start
    descendants: Processes = {}
    queue = list(children.get(root, ()))
    while queue:
        pid = queue.pop()
        descendants[pid] = started[pid]
        queue += children.get(pid, ())
    return descendants


def list_alive(processes: Processes) -> list[int]:
    """The ids of the processes that still live; zombies do not count."""
    alive = []
    for pid, start in processes.items():
        stat = _read_stat(pid)
        if stat is not None and stat[1] == start:
            alive.append(pid)
    return alive


def _read_stat(pid: int) -> tuple[int, int] | None:
    """(parent, start time) of a living process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The process name before the last ")" may contain spaces.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else (int(fields[1]), int(fields[19]))


def _is_training(pid: int) -> bool:
    try:
        return b"liverseg_dist\0train" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@contextlib.contextmanager
def guard_processes() -> Iterator[Callable[[], None]]:
    """Run the guard during the block.

    Yields:
        A function that reports a clean exit, for a process that ends within the block after it has
        printed the reason itself.
    """
    process = subprocess.Popen(
        # -I: independent of PYTHONPATH and of the packages of the user.
        [sys.executable, "-I", str(Path(__file__).resolve()), str(os.getpid())],
        stdin=subprocess.PIPE,
        # A signal to the process group of the driver must not end the guard.
        start_new_session=True,
    )
    assert process.stdin is not None
    pipe = process.stdin

    def report_clean_exit() -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):
            pipe.write(CLEAN_EXIT)
            pipe.close()

    try:
        yield report_clean_exit
    finally:
        report_clean_exit()
        process.wait()


def main(driver: int) -> None:
    """Watch the driver; after its end, kill the processes that are left."""
    known: Processes = {}
    # Standard input is the pipe; it is readable when the driver writes to it or ends.
    while not select.select([0], [], [], INTERVAL_S)[0]:
        descendants = list_descendants(driver)
        descendants.pop(os.getpid(), None)
        # A process whose parent has ended is no descendant any more, but stays on the list.
        alive = list_alive(known)
        known = {pid: start for pid, start in known.items() if pid in alive}
        known |= descendants
    if os.read(0, 1) != CLEAN_EXIT:
        message = (
            "launch: this process was killed, or Ray has ended it; all results are kept, "
            "run the same line again to continue"
        )
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr, flush=True)
    end = time.monotonic() + GRACE_S
    left = _list_to_kill(known)
    while left and time.monotonic() < end:
        time.sleep(POLL_S)
        left = _list_to_kill(known)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _list_to_kill(known: Processes) -> list[int]:
    return [pid for pid in list_alive(known) if not _is_training(pid)]


if __name__ == "__main__":
    main(int(sys.argv[1]))
