"""What a sweep leaves: `best.yaml`, `sweep.json`, `sweep.html` and TensorBoard HParams, all made from the journal."""

import json
import math
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch.utils.tensorboard import SummaryWriter

from launch.sweep.config import Dimension, SweepSettings, to_yaml, trial_tree
from launch.sweep.journal import Trial
from launch.sweep.search import MANY, importances
from liverseg_dist.evaluation import svg
from liverseg_dist.training.run_folder import write_text

WIDTH, HEIGHT = 520, 250


def write_results(folder: Path, settings: SweepSettings, trials: Sequence[Trial]) -> dict[str, Any]:
    """Write all four; returns what sweep.json holds. best.yaml is absent while no trial has finished."""
    best = best_of(trials)
    summary = {
        "schema": 1,
        "best": None if best is None else _record(best),
        "trials": [_record(trial) for trial in trials],
        "fold_hours": sum(rung.seconds for trial in trials for rung in trial.rungs) / 3600,
        "gpu_hours": settings.sweep.resources.gpus * sum(r.seconds for t in trials for r in t.rungs) / 3600,
        "steps_run": steps_run(trials, settings),
        "steps_unpruned": sum(t.state != "failed" for t in trials)
        * settings.train.max_steps
        * len(settings.sweep.folds),
    }
    if best is not None:
        header = f"Best of {len(trials)} trials: Dice {best.score:.4f} ± {best.rungs[-1].spread:.4f} over folds.\n"
        header += "train --config THIS run.dir=DIR data.fold=K"
        write_text(folder / "best.yaml", to_yaml(_for_training(trial_tree(settings, best.params)), header))
    write_text(folder / "sweep.json", json.dumps(summary, indent=1))
    write_text(folder / "sweep.html", render(settings, trials, summary))
    _write_hparams(folder / "tensorboard", trials)
    return summary


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """Highest mean Dice at the end; the earlier trial of equal ones."""
    finished = [trial for trial in trials if trial.state == "finished"]
    return max(finished, key=lambda trial: (trial.score or 0.0, -trial.number), default=None)


def steps_run(trials: Sequence[Trial], settings: SweepSettings) -> int:
    """Optimizer steps of all folds up to the last common stop."""
    return sum(trial.rungs[-1].step for trial in trials if trial.rungs) * len(settings.sweep.folds)


def render(settings: SweepSettings, trials: Sequence[Trial], summary: dict[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("launch.sweep"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    best = best_of(trials)
    ranked = sorted(trials, key=lambda t: (_ORDER[t.state], -(t.rungs[-1].step if t.rungs else 0), -(t.score or 0)))
    keys = list(settings.sweep.space)
    return environment.get_template("sweep.html.j2").render(
        sweep=settings.sweep,
        store=Path(settings.data.store or "").name,  # where it lies is no part of the result
        max_steps=settings.train.max_steps,
        best=best,
        best_yaml="\n".join(f"{key}: {shown(value)}" for key, value in best.params.items()) if best else "",
        trials=ranked,
        summary=summary,
        counts={state: sum(t.state == state for t in trials) for state in _ORDER},
        curves=learning_curves(trials, best, settings.train.max_steps),
        parallel=parallel_coordinates(settings.sweep.space, trials, best),
        scatters=[(key, scatter(key, settings.sweep.space[key], trials, best)) for key in keys],
        importances=importances(settings.sweep.space, trials),
        many=MANY,
        keys=keys,
        shown=shown,
    )


_ORDER = {"finished": 0, "running": 1, "pruned": 2, "failed": 3}


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _record(trial: Trial) -> dict[str, Any]:
    return {
        "number": trial.number, "id": trial.id, "state": trial.state, "reason": trial.reason, "params": trial.params,
        "score": trial.score, "spread": trial.rungs[-1].spread if trial.rungs else None,
        "step": trial.rungs[-1].step if trial.rungs else 0, "folds": trial.rungs[-1].folds if trial.rungs else {},
        "rungs": [rung.__dict__ for rung in trial.rungs],
    }  # fmt: skip


def _for_training(tree: dict[str, Any]) -> dict[str, Any]:
    return {section: value for section, value in tree.items() if value != {}}


def _write_hparams(folder: Path, trials: Sequence[Trial]) -> None:
    """A run per trial, so that TensorBoard's HPARAMS page compares them; written anew each time."""
    shutil.rmtree(folder, ignore_errors=True)
    for trial in trials:
        writer = SummaryWriter(str(folder / f"trial_{trial.number:03d}_{trial.id}"))
        for rung in trial.rungs:
            writer.add_scalar("sweep/dice_mean", rung.score, rung.step)
            writer.add_scalar("sweep/dice_spread", rung.spread, rung.step)
        values = {k: v if isinstance(v, (bool, int, float, str)) else shown(v) for k, v in trial.params.items()}
        figures = {"hparam/dice_mean": trial.score or 0.0, "hparam/steps": trial.rungs[-1].step if trial.rungs else 0}
        writer.add_hparams({**values, "state": trial.state}, figures, run_name=".")
        writer.close()


def _kind(trial: Trial, best: Trial | None) -> str:
    return "best" if best is not None and trial.id == best.id else trial.state


def _hint(trial: Trial) -> str:
    score = "no score" if trial.score is None else f"Dice {trial.score:.4f}"
    return f"trial {trial.number} ({trial.state}): {score}"


def _score_axis(trials: Sequence[Trial], start: float, stop: float) -> svg.Axis:
    scores = [rung.score for trial in trials for rung in trial.rungs]
    low, high = (min(scores), max(scores)) if scores else (0.0, 1.0)
    margin = max(0.01, 0.08 * (high - low))
    return svg.Axis(max(0.0, low - margin), min(1.0, high + margin), start, stop)


def learning_curves(trials: Sequence[Trial], best: Trial | None, max_steps: int) -> Markup:
    """Mean Dice over folds at each stop; the bars of the best trial are the spread."""
    unit = 1000 if max_steps >= 10_000 else 1
    x, y = svg.Axis(0, max_steps / unit, 62, 2 * WIDTH - 20), _score_axis(trials, HEIGHT - 40, 14)
    marks = svg.x_axis(x, HEIGHT - 40, 14, "step" if unit == 1 else "thousand steps") + svg.y_axis(
        y, 62, 2 * WIDTH - 20, "mean Dice over folds"
    )
    for trial in sorted(trials, key=lambda t: _kind(t, best) == "best"):
        kind = _kind(trial, best)
        for one, two in pairwise(trial.rungs):
            marks.append(svg.line(x(one.step / unit), y(one.score), x(two.step / unit), y(two.score), f"curve {kind}"))
        for rung in trial.rungs:
            if kind == "best":
                low, high = y(rung.score - rung.spread), y(rung.score + rung.spread)
                marks.append(svg.line(x(rung.step / unit), low, x(rung.step / unit), high, "spread"))
            hint = f"trial {trial.number}, step {rung.step}: {rung.score:.4f} ± {rung.spread:.4f}, {rung.decision}"
            marks.append(svg.circle(x(rung.step / unit), y(rung.score), 3.6, f"dot {kind}", hint))
    return svg.picture(2 * WIDTH, HEIGHT, marks, "Learning curves of the trials")


def _place(dimension: Dimension, value: Any) -> float:
    """0 to 1 along a hyperparameter's range."""
    if dimension.values is not None:
        names = [shown(v) for v in dimension.values]
        return 0.5 if len(names) == 1 else names.index(shown(value)) / (len(names) - 1)
    low, high = dimension.low or 0.0, dimension.high or 0.0
    if dimension.type == "loguniform":
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def _labels(dimension: Dimension) -> list[tuple[float, str]]:
    if dimension.values is not None:
        return [(_place(dimension, value), shown(value)) for value in dimension.values]
    return [(0.0, shown(dimension.low)), (1.0, shown(dimension.high))]


def parallel_coordinates(space: dict[str, Dimension], trials: Sequence[Trial], best: Trial | None) -> Markup:
    """A line a trial through its hyperparameters to its last mean Dice."""
    width, top, bottom = 2 * WIDTH, 34, HEIGHT - 24
    score = _score_axis(trials, bottom, top)
    columns = [90 + i * (width - 180) / len(space) for i in range(len(space) + 1)]
    marks = [svg.line(x, top, x, bottom, "axis") for x in columns]
    marks.append(svg.text(columns[-1], 16, "mean Dice", "middle", "title"))
    marks += [svg.text(columns[-1] + 7, score(t) + 4, svg.shown(t), "start", "tick") for t in score.ticks()]
    for trial in sorted(trials, key=lambda t: _kind(t, best) == "best"):
        if trial.score is None:
            continue
        points = [
            (x, bottom - _place(dimension, trial.params[key]) * (bottom - top))
            for x, (key, dimension) in zip(columns, space.items(), strict=False)
            if key in trial.params
        ]
        points.append((columns[-1], score(trial.score)))
        for (x1, y1), (x2, y2) in pairwise(points):
            marks.append(
                svg.line(round(x1, 1), round(y1, 1), round(x2, 1), round(y2, 1), f"curve {_kind(trial, best)}")
            )
        marks.append(
            svg.circle(round(points[-1][0], 1), round(points[-1][1], 1), 3.6, f"dot {_kind(trial, best)}", _hint(trial))
        )
    for x, (key, dimension) in zip(columns, space.items(), strict=False):
        marks.append(svg.text(x, 16, key, "middle", "title"))
        for share, name in _labels(dimension):
            marks.append(svg.text(x - 7, bottom - share * (bottom - top) + 4, name, "end", "tick"))
    return svg.picture(width, HEIGHT, marks, "Parallel coordinates of the trials")


def scatter(key: str, dimension: Dimension, trials: Sequence[Trial], best: Trial | None) -> Markup:
    """Last mean Dice over one hyperparameter."""
    y, bottom = _score_axis(trials, HEIGHT - 40, 14), HEIGHT - 40
    marks = svg.y_axis(y, 62, WIDTH - 20, "mean Dice")
    if dimension.values is None and dimension.low is not None and dimension.high is not None:
        log = dimension.type == "loguniform"
        axis = svg.Axis(dimension.low, dimension.high, 70, WIDTH - 28, log=log)
        marks += svg.x_axis(axis, bottom, 14, key)
    else:
        for share, name in _labels(dimension):
            marks.append(svg.text(110 + share * (WIDTH - 180), bottom + 15, name, "middle", "tick"))
        marks.append(svg.text(WIDTH / 2 + 20, bottom + 32, key, "middle", "title"))
    for trial in trials:
        if trial.score is not None and key in trial.params:
            value = trial.params[key]
            x = axis(value) if dimension.values is None else 110 + _place(dimension, value) * (WIDTH - 180)
            hint = f"{_hint(trial)}, {key} = {shown(value)}"
            marks.append(svg.circle(round(x, 1), y(trial.score), 4, f"dot {_kind(trial, best)}", hint))
    return svg.picture(WIDTH, HEIGHT, marks, f"Mean Dice over {key}")
