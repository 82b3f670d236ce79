"""The table of a running sweep: order of the rows, and rows that fit into the terminal."""

import os

import pytest
from rich.console import Group

from launch.sweep.journal import Rung, Trial
from launch.sweep.live_table import MAX_ROWS, build_live_table
from tests.launch.test_tune import make_settings


def make_trial(number: int, state: str, score: float | None = None) -> Trial:
    rungs = []
    if score is not None:
        rungs = [Rung.from_folds(2, {"0": {"score": score}, "1": {"score": score}}, "end", 1.0)]
    params = {"train.learning_rate": 0.001 * (number + 1), "data.augmentation": "light"}
    return Trial(number, f"t{number}", params, rungs, state)


def list_lines(table: Group) -> list[str]:
    return [str(part) for part in table.renderables]


def set_size(monkeypatch: pytest.MonkeyPatch, columns: int, lines: int) -> None:
    size = os.terminal_size((columns, lines))
    monkeypatch.setattr("launch.sweep.live_table.shutil.get_terminal_size", lambda: size)


def test_running_trials_come_first_then_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    set_size(monkeypatch, 120, 40)
    trials = [
        make_trial(0, "failed"),
        make_trial(1, "finished", 0.4),
        make_trial(2, "finished", 0.6),
        make_trial(3, "running"),
        make_trial(4, "waiting"),
    ]
    title, _, *rows = list_lines(build_live_table(make_settings(), trials, 125.0))
    assert title.startswith("2 min 05 s: 1 running, 1 waiting, 2 finished, 1 failed")
    rows = [row.split() for row in rows if row.split() and row.split()[0].isdigit()]
    assert [row[0] for row in rows] == ["3", "4", "2", "1", "0"]
    assert [row[1] for row in rows] == ["running", "waiting", "best", "finished", "failed"]
    assert rows[2][3] == "0.6000"


@pytest.mark.parametrize(("columns", "lines"), [(120, 12), (40, 20), (120, 200), (20, 3)])
def test_the_table_fits_and_says_what_is_hidden(
    columns: int, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_size(monkeypatch, columns, lines)
    trials = [make_trial(number, "finished", 0.01 * number) for number in range(50)]
    found = list_lines(build_live_table(make_settings(), trials, 0.0))
    assert found[-1].endswith("more in sweep.html at the end")
    hidden = int(found[-1].split()[0])
    assert 50 - MAX_ROWS <= hidden < 50
    # At least one trial is shown, even where it does not fit.
    if hidden < 49:
        assert len(found) <= lines
