"""Handling of Ctrl-C and of the hang-up of a terminal, for all commands.

While modules are imported, the first signal ends the process: there is nothing to clean up, and
some libraries suppress exceptions during their import. Later the first signal raises
`KeyboardInterrupt` in the main thread; the command cleans up and exits with code 75. A second
signal ends the process at once with the same code. Training replaces this handler while it runs
(`training.preemption`), because it saves a checkpoint first.
"""

import os
import signal
import time
from contextlib import suppress
from types import FrameType

from liverseg_dist.errors import EXIT_RESUMABLE
from liverseg_dist.streams import STDERR

SAME_SIGNAL_S = 0.5
"""The launcher and the terminal may both deliver a Ctrl-C: signals within this time count once."""
INTERRUPTED_MESSAGE = "interrupted; run the same line again to continue"


def write_line(text: str) -> None:
    """Write a line to stderr. Safe in signal handlers and threads: it bypasses the stream's
    lock."""
    with suppress(OSError):
        os.write(STDERR, f"liverseg: {text}\n".encode(errors="backslashreplace"))


def is_first_rank() -> bool:
    """Return whether this process is rank 0 of its job, according to the environment.

    Unlike `World` it needs no torch, so it works before the other modules are imported.
    """
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return rank == "0"


class InterruptHandler:
    """Raises `KeyboardInterrupt` at the first signal after work has begun, and exits at the
    next."""

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
        # No clean-up: modules may be imported only in part, or the clean-up itself may hang.
        os._exit(EXIT_RESUMABLE)


def handle_interrupts() -> InterruptHandler:
    """Install the handler for Ctrl-C and hang-up, unless it is installed. Returns it.

    Signals that the program inherits as ignored (nohup, `&` in a script) stay ignored.
    """
    installed = signal.getsignal(signal.SIGINT)
    handler = installed if isinstance(installed, InterruptHandler) else InterruptHandler()
    if installed is signal.default_int_handler:
        signal.signal(signal.SIGINT, handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, handler)
    return handler
