"""Progress over the cases of all ranks, shown by rank 0.

Each rank counts its own cases; `HeartbeatMonitor` brings the counts to rank 0 with the signs of life that it sends anyway. The
count of other ranks is therefore some seconds old, and complete at the end.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.world import World
from liverseg_dist.tracking.progress import ProgressLine, show_progress


class CaseProgress:
    """Counts this rank's cases; on rank 0 it shows the sum over ranks."""

    def __init__(self, line: ProgressLine, watch: HeartbeatMonitor, is_main: bool) -> None:
        self._line, self._watch, self._is_main = line, watch, is_main
        self._others, self._note = 0, ""
        # `HeartbeatMonitor` calls from its own thread.
        self._lock = threading.Lock()

    def advance(self, note: str = "", shared: bool = False) -> None:
        """Count a case as done. `shared`: all ranks computed it together, so that only rank 0 counts it."""
        if self._is_main or not shared:
            self._watch.done += 1
        self._note = note
        self._show()

    def update_others(self, done: int) -> None:
        """Take over how many cases the other ranks have done."""
        self._others = done
        self._show()

    def complete(self, total: int) -> None:
        """Show the total, once all ranks have ended."""
        with self._lock:
            if self._line.done < total:
                self._line.advance(total - self._line.done, note=self._note)

    def _show(self) -> None:
        with self._lock:
            new = self._watch.done + self._others - self._line.done
            if new > 0:
                self._line.advance(new, note=self._note)


@contextmanager
def case_progress(
    title: str, total: int, world: World, watch: HeartbeatMonitor
) -> Iterator[CaseProgress]:
    """A progress line for `total` cases of all ranks. The block must end with a collective call and `complete`."""
    with show_progress(title, total, quiet=not world.is_main) as line:
        cases = CaseProgress(line, watch, world.is_main)
        watch.begin_phase(cases.update_others)
        try:
            yield cases
        finally:
            watch.on_others = None
