"""Processes of a stage: who works for whom, what is left, and how long until nothing is."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.chaos.warm import Forked

Process = subprocess.Popen[bytes] | Forked
_PR_SET_CHILD_SUBREAPER = 36


class Hang(AssertionError):
    """A stage did not end in the time it was given."""


@contextlib.contextmanager
def orphans_are_ours() -> Iterator[None]:
    """While the block runs, a process whose parent was killed becomes a child of this one, so that none is lost."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """Processes that work for it, its children's children too, oldest first."""
    found, new = [], [pid]
    while new:
        tasks = [task for one in new for task in Path(f"/proc/{one}/task").glob("*/children")]
        new = []
        for path in tasks:
            with contextlib.suppress(OSError):
                new += [int(child) for child in path.read_text().split()]
        found += new
    return found


def command_of(pid: int) -> str:
    try:
        return (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        )
    except OSError:
        return ""


def is_python(pid: int) -> bool:
    return "python" in command_of(pid)


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def wait(
    process: Process, timeout_s: float, others: frozenset[int], progress: Callable[[], int]
) -> None:
    """Until it has ended and all it started, `others` of ours aside. Raises `Hang`, with nothing left running, when it
    neither ends nor makes progress for `timeout_s`.
    """
    end, before = time.monotonic() + timeout_s, progress()
    while process.poll() is None or living(process, others):
        if (now := progress()) > before:
            end, before = time.monotonic() + timeout_s, now
        if time.monotonic() > end:
            left = living(process, others)
            said = "; ".join(command_of(pid)[:90] for pid in left[:4])
            for pid in left:
                send(pid, signal.SIGKILL)
            process.wait()
            raise Hang(f"no end and no progress for {timeout_s:.0f} s: {said}")
        time.sleep(0.05)


def kill(others: frozenset[int]) -> None:
    """All that works for us, `others` aside."""
    for pid in descendants(os.getpid()):
        if pid not in others:
            send(pid, signal.SIGKILL)


def living(process: Process, others: frozenset[int]) -> list[int]:
    """What the stage has running yet; dead orphans are buried on the way."""
    left = []
    for pid in descendants(os.getpid()):
        if pid in others:
            continue
        try:
            state = (
                Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
            )
        except OSError:
            continue
        if state not in "ZX":
            left.append(pid)
        elif pid != process.pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
    return left
