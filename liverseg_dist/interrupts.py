"""Ctrl-C and the hang-up of a terminal, the same for all commands and their worker processes.

The first signal raises `KeyboardInterrupt` in the main thread: the command cleans up and ends with exit code 75. The
second one ends the process at once with the same code. Training has its own handler while it runs
(`training.preemption`), as it saves a checkpoint first.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from types import FrameType

from liverseg_dist.errors import EXIT_RESUMABLE
from liverseg_dist.streams import STDERR, guard_output_streams

SAME_SIGNAL_S = 0.5
"""A launcher and the terminal may both deliver one Ctrl-C; a second signal within this time is the same one."""
AGAIN = "interrupted; run the same line again to continue"


def write_line(text: str) -> None:
    """One line to stderr, from a signal handler or a thread while the stream may be in use."""
    with suppress(OSError):
        os.write(STDERR, f"liverseg: {text}\n".encode(errors="backslashreplace"))


def is_first_rank() -> bool:
    """Whether this process is the one of its job that reports; also before the ranks are connected."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return rank == "0"


class _InterruptHandler:
    """Raises `KeyboardInterrupt` at the first signal, ends the process at the next."""

    def __init__(self) -> None:
        self._first_s: float | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_s is None:
            self._first_s = now
            raise KeyboardInterrupt(signal.Signals(number).name)
        if now - self._first_s < SAME_SIGNAL_S:
            return
        if is_first_rank():
            write_line("ended at once by a second signal; run the same line again to continue")
        os._exit(EXIT_RESUMABLE)


def handle_interrupts() -> None:
    """Install the handler for Ctrl-C and hang-up. Signals that the caller ignores (nohup, `&`) stay ignored."""
    handler = _InterruptHandler()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, handler)


def begin_worker() -> None:
    """Start of a worker process: signals of the terminal are for its parent, and it ends when the parent ends."""
    guard_output_streams()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


@contextmanager
def worker_pool(workers: int, context: BaseContext) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that an error or an interrupt ends at once, without waiting for the work in progress."""
    with ProcessPoolExecutor(workers, context, initializer=begin_worker) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


@contextmanager
def terminal_signals_blocked() -> Iterator[None]:
    """While processes are started: they inherit the mask, so Ctrl-C cannot reach one before `begin_worker` runs."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
