"""Stopping on request: a signal sets a flag, and the ranks agree on it one step later.

A signal handler must not save a checkpoint itself: saving is a collective operation, and the ranks
receive the signal in different steps.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from liverseg_dist.errors import EXIT_RESUMABLE
from liverseg_dist.interrupts import SAME_SIGNAL_S, is_first_rank, write_line
from liverseg_dist.training.run_folder import RunFolder

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


class StopWhileWaiting(Exception):
    """A stop was requested while a single process waited for data."""


class StopFlag:
    """`with StopFlag() as stop: ... if stop.requested`.

    SIGTERM and SIGUSR2 (SLURM, submitit), Ctrl-C and the hang-up of the terminal request a stop;
    under nohup a hang-up has no effect.

    Args:
        end_now: called at a second Ctrl-C to end the process. It runs on a separate thread, so it
            also works while the main thread is in native code, for example in a collective call.
    """

    def __init__(self, end_now: Callable[[], None] | None = None) -> None:
        self.signal_name = ""
        self._end_now = end_now
        self._before: dict[int, object] = {}
        self._first_interrupt_s: float | None = None
        self._pipe: tuple[int, int] | None = None
        self._wakeup_before = -1
        self._thread: threading.Thread | None = None
        self._may_interrupt = False

    @property
    def requested(self) -> bool:
        """Whether a signal has requested a stop."""
        return bool(self.signal_name)

    def __enter__(self) -> "StopFlag":
        # Python allows signal handlers only in the main thread.
        if threading.current_thread() is threading.main_thread():
            if self._end_now is not None:
                self._start_signal_thread()
            for number in SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._set)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Restore the handlers; after an error or a stop keep ignoring requests to stop.

        A launcher sends SIGTERM as soon as one rank has ended. The other ranks still have to report
        the failure, or to record that the run has stopped.
        """
        ending = kind is not None or self.requested
        for number, handler in self._before.items():
            if not ending or number == signal.SIGINT:
                signal.signal(number, handler)  # type: ignore[arg-type]
        if self._pipe is not None:
            # First, because signals would otherwise be written to a closed pipe.
            signal.set_wakeup_fd(self._wakeup_before)
            # The end of file ends the thread.
            os.close(self._pipe[1])
            if self._thread is not None:
                self._thread.join()
            os.close(self._pipe[0])
            self._pipe = None

    def allow_interruption(self, is_allowed: bool) -> None:
        """Choose whether a request may interrupt the main thread, as while it waits for data.

        Only for a single process: the other ranks of a job would wait for the interrupted one.

        Raises:
            StopWhileWaiting: it is allowed, and a stop is requested already.
        """
        self._may_interrupt = is_allowed
        if is_allowed and self.requested:
            self._interrupt()

    def _interrupt(self) -> None:
        # Once: the code that handles the exception must not be interrupted as well.
        self._may_interrupt = False
        raise StopWhileWaiting

    def _set(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._end_now is None and self._is_second_interrupt():
            raise KeyboardInterrupt
        self.signal_name = self.signal_name or signal.Signals(number).name
        if self._may_interrupt:
            self._interrupt()

    def _is_second_interrupt(self) -> bool:
        """Return whether there was an earlier Ctrl-C.

        The launcher and the terminal may both deliver the same one.
        """
        now = time.monotonic()
        if self._first_interrupt_s is None:
            self._first_interrupt_s = now
            return False
        return now - self._first_interrupt_s >= SAME_SIGNAL_S

    def _start_signal_thread(self) -> None:
        """Let the interpreter write the number of each signal to a pipe that a thread reads."""
        # `set_wakeup_fd` requires a non-blocking descriptor.
        self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(
            target=self._read_signals, name="liverseg-signals", daemon=True
        )
        self._thread.start()

    def _read_signals(self) -> None:
        assert self._pipe is not None
        assert self._end_now is not None
        while True:
            select.select([self._pipe[0]], [], [])
            numbers = os.read(self._pipe[0], 64)
            if not numbers:
                return
            for number in numbers:
                if number == signal.SIGINT and self._is_second_interrupt():
                    self._end_now()


def describe_loss(saved: int, step: int) -> str:
    """Describe which steps a run loses that ends without saving.

    Args:
        saved: step of the newest checkpoint; 0 without one.
        step: steps done.
    """
    if saved >= step:
        return "no complete step is lost"
    lost = f"step {step} is lost" if step == saved + 1 else f"steps {saved + 1} to {step} are lost"
    newest = f"the newest checkpoint is of step {saved}" if saved else "there is no checkpoint yet"
    return f"{lost}, {newest}"


def end_at_once(folder: RunFolder, step: int, max_steps: int) -> NoReturn:
    """End this process without another checkpoint. Rank 0 records from where the run continues.

    Args:
        folder: The run's folder.
        step: Optimizer steps that are done.
        max_steps: Last step of the run.
    """
    if is_first_rank():
        saved = folder.newest_checkpoint()
        message = f"ended at once by a second Ctrl-C: {describe_loss(saved, step)}"
        with suppress(OSError):
            folder.set_status("stopped", saved, max_steps, message)
        write_line(f"{message}; the same line continues")
    for stream in (sys.stdout, sys.stderr):
        # With a slow reader the main thread may hold the stream's lock for a long time.
        flushing = threading.Thread(target=stream.flush, daemon=True)
        flushing.start()
        flushing.join(timeout=1)
    # Without clean-up: the main thread may be waiting in a collective call.
    os._exit(EXIT_RESUMABLE)
