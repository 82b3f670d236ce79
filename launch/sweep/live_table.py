"""The output of a running sweep: a line per decision, and in a terminal a table below the lines."""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from liverseg_dist.console import write_lines
from liverseg_dist.tracking.terminal_table import format_table

from .journal import Journal, Trial, find_best_trial
from .sweep_charts import format_value
from .sweep_config import SweepSettings

MAX_ROWS = 20
OTHER_LINES = 4
"""Lines of the terminal for the title, the count of hidden rows and the line that is printed."""
REFRESHES_PER_S = 1.0
_STYLES = {
    "running": "cyan",
    "waiting": "blue",
    "finished": "green",
    "failed": "red",
    "pruned": "yellow",
    "replaced": "dim",
}
"""Color of each state."""
_STATE_ORDER = {"running": 0, "waiting": 1}


@contextlib.contextmanager
def show_live_table(settings: SweepSettings, journal: Journal) -> Iterator[Callable[[str], None]]:
    """Show the table during the block; yields the function that prints a line."""
    console = Console()
    if not console.is_terminal:
        yield write_lines
        return
    begun = time.monotonic()

    def build_table() -> Group:
        trials = list(journal.trials.values())
        return build_live_table(settings, trials, time.monotonic() - begun)

    with Live(
        get_renderable=build_table,
        console=console,
        refresh_per_second=REFRESHES_PER_S,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as live:
        yield lambda text: live.console.print(text, markup=False, highlight=False)
    sys.stdout.flush()


def build_live_table(settings: SweepSettings, trials: list[Trial], elapsed_s: float) -> Group:
    """The table: running trials first, then the others, best first.

    The rows are folded to the width of the terminal, and limited to its height.

    Args:
        settings: The settings of the sweep.
        trials: All trials.
        elapsed_s: Time since the start, for the title.
    """
    best = find_best_trial(trials)
    headings = ("trial", "state", "step", "Dice", "spread", *settings.sweep.space)
    right_aligned = [name for name in headings if name != "state"]
    ranked = sorted(trials, key=_rank_trial)
    size = shutil.get_terminal_size()
    count = min(MAX_ROWS, len(ranked))
    while True:
        rows = [_format_cells(settings, trial, best) for trial in ranked[:count]]
        lines = format_table(headings, rows, size.columns, right_aligned)
        # A row may take several lines, so the number of rows that fit is found by trying.
        if len(lines) + OTHER_LINES <= size.lines or count <= 1:
            break
        count -= 1
    minutes, seconds = divmod(int(elapsed_s), 60)
    counts = ", ".join(f"{_count_state(trials, state)} {state}" for state in _STYLES)
    parts = [Text(f"{minutes} min {seconds:02d} s: {counts}"), *lines]
    hidden = len(ranked) - count
    if hidden:
        parts.append(Text(f"{hidden} more in sweep.html at the end", style="dim"))
    return Group(*parts)


def _rank_trial(trial: Trial) -> tuple[float, ...]:
    """Sort key of the rows."""
    order = _STATE_ORDER.get(trial.state, len(_STATE_ORDER))
    return (order, -trial.step, -(trial.score or 0), trial.number)


def _count_state(trials: list[Trial], state: str) -> int:
    return sum(trial.state == state for trial in trials)


def _format_cells(settings: SweepSettings, trial: Trial, best: Trial | None) -> list[Text]:
    """The cells of one row."""
    scores = ["", ""]
    if trial.score is not None:
        scores = [f"{trial.score:.4f}", f"{trial.rungs[-1].spread:.4f}"]
    values = []
    for key in settings.sweep.space:
        values.append(format_value(trial.params[key]) if key in trial.params else "")
    state = "best" if best is not None and trial.id == best.id else trial.state
    cells = (str(trial.number), state, str(trial.step), *scores, *values)
    return [Text(cell, style=_STYLES[trial.state]) for cell in cells]
