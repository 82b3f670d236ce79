"""Progress on stderr: a bar on a terminal, a line at intervals in a log file."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from liverseg_dist.console import is_progress_shown, write_progress

LOG_INTERVAL_S = 15.0
"""Shortest time between two lines where stderr is not a terminal."""


class ProgressLine:
    """Counts steps, of a known total or not, and shows them."""

    def __init__(self, description: str, total: int | None, bar: Progress | None) -> None:
        self.description, self.total, self.done = description, total, 0
        self._bar = bar
        self._task = bar.add_task(description, total=total, note="") if bar else None
        self._started = time.monotonic()
        self._last_line = self._started

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count steps; `note` is a short text shown after the counts."""
        self.done += steps
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=steps, note=note)
            return
        now = time.monotonic()
        if self.done == self.total or now - self._last_line >= LOG_INTERVAL_S:
            self._last_line = now
            counts = self._counts(now - self._started)
            write_progress(f"{self.description}: {counts}  {note}".rstrip())

    def _counts(self, elapsed_s: float) -> str:
        if not self.total:
            return f"{self.done}"
        left = elapsed_s / self.done * (self.total - self.done) if self.done else float("nan")
        return f"{self.done}/{self.total}, {elapsed_s:.0f} s, {left:.0f} s left"


@contextmanager
def show_progress(
    description: str, total: int | None = None, *, quiet: bool = False
) -> Iterator[ProgressLine]:
    """Show progress: `with show_progress("convert", n) as line: line.advance(note="liver_28")`.

    Args:
        description: Name of the work.
        total: Number of steps, if known.
        quiet: Show nothing. Ranks above 0 and commands with `--quiet` show nothing anyway.
    """
    quiet = quiet or not is_progress_shown()
    # soft_wrap: a long path stays in one piece, so that it can be copied.
    console = Console(stderr=True, quiet=quiet, soft_wrap=True)
    if quiet or not console.is_terminal:
        line = ProgressLine(description, total, None)
        # A quiet line counts, but never prints.
        if quiet:
            line._last_line = float("inf")
            line.total = None
        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield ProgressLine(description, total, bar)
