"""Progress over the cases of all ranks, shown by rank 0.

Each rank counts its own cases. `HeartbeatMonitor` sends the counts to rank 0 together with its heartbeats, so the count
of other ranks is some seconds old during the work and complete at the end.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.tracking.progress import ProgressLine, show_progress

NO_STEP = -1
"""Step that a rank reports when its work is not divided into training steps."""


class CaseProgress:
    """Counts this rank's cases; on rank 0 it shows the sum over ranks."""

    def __init__(self, line: ProgressLine, monitor: HeartbeatMonitor) -> None:
        self._line, self._monitor = line, monitor
        self._done_by_others, self._note = 0, ""
        # The monitor calls `update_others` from its own thread.
        self._lock = threading.Lock()

    def report_activity(self, activity: str) -> None:
        """Set what this rank is doing, for the message that names slow or lost ranks."""
        self._monitor.report_progress(NO_STEP, activity)

    def advance(self, note: str = "", shared: bool = False) -> None:
        """Count a case as done.

        Args:
            note: text behind the count, such as the case id.
            shared: all ranks computed the case together, so that it counts once.
        """
        self._monitor.count_case(shared)
        self._note = note
        self._show()

    def update_others(self, done: int) -> None:
        """Set the number of cases that the other ranks have done."""
        self._done_by_others = done
        self._show()

    def complete(self, total: int) -> None:
        """Show the total, after all ranks have finished."""
        with self._lock:
            # The count of the other ranks lags by a heartbeat, so the line may still be short of
            # the total when the work is done.
            if self._line.done < total:
                self._line.advance(total - self._line.done, note=self._note)

    def _show(self) -> None:
        with self._lock:
            # Both threads may have counted the same case; only what the line does not show yet is
            # added.
            new = self._monitor.done + self._done_by_others - self._line.done
            if new > 0:
                self._line.advance(new, note=self._note)


@contextmanager
def case_progress(title: str, total: int, monitor: HeartbeatMonitor) -> Iterator[CaseProgress]:
    """Show a progress line for `total` cases of all ranks.

    The block must end with a collective call and `complete`.
    """
    with show_progress(title, total) as line:
        progress = CaseProgress(line, monitor)
        monitor.begin_phase(progress.update_others)
        try:
            yield progress
        finally:
            # A later phase starts with its own counts; a late heartbeat must not move a line that
            # is closed.
            monitor.on_others = None
