"""Ctrl-C and the hang-up of a terminal, the same for all commands.

While modules are imported, the first signal ends the process: there is nothing to clean up, and an exception in the
middle of an import is swallowed by some libraries. Later it raises `KeyboardInterrupt` in the main thread; the command
cleans up and ends with exit code 75. The second signal ends the process at once with the same code. Training has its
own handler while it runs (`training.preemption`), as it saves a checkpoint first.
"""

import os
import signal
import time
from contextlib import suppress
from types import FrameType

from liverseg_dist.errors import EXIT_RESUMABLE
from liverseg_dist.streams import STDERR

SAME_SIGNAL_S = 0.5
"""A launcher and the terminal may both deliver one Ctrl-C; a second signal within this time is the same one."""
INTERRUPTED_MESSAGE = "interrupted; run the same line again to continue"


def write_line(text: str) -> None:
    """One line to stderr, from a signal handler or a thread while the stream may be in use."""
    with suppress(OSError):
        os.write(STDERR, f"liverseg: {text}\n".encode(errors="backslashreplace"))


def is_first_rank() -> bool:
    """Whether this process is the one of its job that reports; also before the ranks are connected."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return rank == "0"


class InterruptHandler:
    """Raises `KeyboardInterrupt` at the first signal once work has begun, ends the process at the next."""

    def __init__(self) -> None:
        self.work_has_begun = False
        self._first_s: float | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.work_has_begun and self._first_s is None:
            self._first_s = now
            raise KeyboardInterrupt(signal.Signals(number).name)
        if self._first_s is not None and now - self._first_s < SAME_SIGNAL_S:
            return
        if is_first_rank():
            write_line(
                INTERRUPTED_MESSAGE
                if self._first_s is None
                else f"ended at once by a second signal; {INTERRUPTED_MESSAGE}"
            )
        os._exit(EXIT_RESUMABLE)


def handle_interrupts() -> InterruptHandler:
    """Install the handler for Ctrl-C and hang-up, unless it is there. Returns it.

    Signals that the caller of the program ignores (nohup, `&` in a script) stay ignored.
    """
    installed = signal.getsignal(signal.SIGINT)
    handler = installed if isinstance(installed, InterruptHandler) else InterruptHandler()
    if installed is signal.default_int_handler:
        signal.signal(signal.SIGINT, handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, handler)
    return handler
