"""What a sweep shows while it runs: a live table in a terminal, and a line for each decision everywhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.live import Live
from rich.table import Table

from .journal import Journal, Trial, best_of
from .sweep_charts import format_value
from .sweep_config import SweepSettings

ROWS = 20
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


def build_live_table(settings: SweepSettings, trials: list[Trial], elapsed_s: float) -> Table:
    """Those under way, then the best; of many trials the first `ROWS`."""
    best = best_of(trials)
    minutes, seconds = divmod(int(elapsed_s), 60)
    counts = ", ".join(f"{sum(t.state == state for t in trials)} {state}" for state in _STYLES)
    made = Table(title=f"{minutes} min {seconds:02d} s: {counts}", title_justify="left")
    for name in ("trial", "state", "step", "Dice", "spread", *settings.sweep.space):
        made.add_column(name, justify="left" if name == "state" else "right")
    order = {"running": 0, "waiting": 1}
    for trial in sorted(
        trials, key=lambda t: (order.get(t.state, 2), -t.step, -(t.score or 0), t.number)
    )[:ROWS]:
        known = (
            ["", ""]
            if trial.score is None
            else [f"{trial.score:.4f}", f"{trial.rungs[-1].spread:.4f}"]
        )
        values = [
            format_value(trial.params[key]) if key in trial.params else ""
            for key in settings.sweep.space
        ]
        state = "best" if best is not None and trial.id == best.id else trial.state
        made.add_row(
            str(trial.number), state, str(trial.step), *known, *values, style=_STYLES[trial.state]
        )
    return made
