"""What a sweep shows while it runs: a live table in a terminal, and a line for each decision everywhere."""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from liverseg_dist.tracking.terminal_table import format_table

from .journal import Journal, Trial, best_of
from .sweep_charts import format_value
from .sweep_config import SweepSettings

ROWS = 20
HEAD_LINES = 4
"""Lines of the terminal that the table leaves free: its title, the count of hidden rows, the line being printed."""
REFRESHES_PER_S = 1.0
_STYLES = {
    "running": "cyan", "waiting": "blue", "finished": "green", "failed": "red", "pruned": "yellow", "replaced": "dim",
}  # fmt: skip


@contextlib.contextmanager
def show_live_table(settings: SweepSettings, journal: Journal) -> Iterator[Callable[[str], None]]:
    """Yields what prints a line. In a terminal the table stays below the lines and is drawn anew each second."""
    console = Console()
    if not console.is_terminal:
        yield lambda text: print(text, flush=True)
        return
    begun = time.monotonic()
    with Live(
        get_renderable=lambda: build_live_table(
            settings, list(journal.trials.values()), time.monotonic() - begun
        ),
        console=console,
        refresh_per_second=REFRESHES_PER_S,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as live:
        yield lambda text: live.console.print(text, markup=False, highlight=False)
    sys.stdout.flush()


def build_live_table(settings: SweepSettings, trials: list[Trial], elapsed_s: float) -> Group:
    """Trials under way, then the best ones; folded to the terminal's width, and as many as its height holds."""
    best = best_of(trials)
    minutes, seconds = divmod(int(elapsed_s), 60)
    counts = ", ".join(f"{sum(t.state == state for t in trials)} {state}" for state in _STYLES)
    headings = ("trial", "state", "step", "Dice", "spread", *settings.sweep.space)
    order = {"running": 0, "waiting": 1}
    ranked = sorted(
        trials, key=lambda t: (order.get(t.state, 2), -t.step, -(t.score or 0), t.number)
    )
    size = shutil.get_terminal_size()
    count = min(ROWS, len(ranked))
    while True:
        rows = [_cells(settings, trial, best) for trial in ranked[:count]]
        right = [name for name in headings if name != "state"]
        lines = format_table(headings, rows, size.columns, right)
        if len(lines) + HEAD_LINES <= size.lines or count <= 1:
            break
        count -= 1
    title = Text(f"{minutes} min {seconds:02d} s: {counts}")
    hidden = len(ranked) - count
    more = [Text(f"{hidden} more in sweep.html at the end", style="dim")] if hidden else []
    return Group(title, *lines, *more)


def _cells(settings: SweepSettings, trial: Trial, best: Trial | None) -> list[Text]:
    scores = (
        ["", ""] if trial.score is None else [f"{trial.score:.4f}", f"{trial.rungs[-1].spread:.4f}"]
    )
    values = [
        format_value(trial.params[key]) if key in trial.params else ""
        for key in settings.sweep.space
    ]
    state = "best" if best is not None and trial.id == best.id else trial.state
    return [
        Text(cell, style=_STYLES[trial.state])
        for cell in (str(trial.number), state, str(trial.step), *scores, *values)
    ]
