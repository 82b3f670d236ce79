"""Stopping on request. A signal only sets a flag; the loop reads it at a step boundary, where all ranks agree on it."""

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopFlag:
    """`with StopFlag() as stop: ... if stop.requested`. SIGTERM and SIGUSR2 (SLURM, submitit), Ctrl-C ask for a stop.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return bool(self.signal_name)

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._set)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an error SIGTERM and SIGUSR2 stay without effect: a launcher sends them as soon as one rank has ended,
        and the others have yet to say which."""
        for number, handler in self._before.items():
            if kind is None or number == signal.SIGINT:
                signal.signal(number, handler)  # type: ignore[arg-type]

    def _set(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
