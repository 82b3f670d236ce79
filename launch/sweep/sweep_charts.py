"""The charts of sweep.html: learning curves, parallel coordinates, Dice over a hyperparameter or a cost."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from liverseg_dist.evaluation.report import svg

from .journal import Rung, Trial
from .search import objective_values, pareto_front
from .sweep_config import Dimension

WIDTH, HEIGHT = 520, 250
WIDTHS = (2 * WIDTH, WIDTH)
"""Of the charts that fill the page: on a screen, and on a phone, where texts must not shrink to nothing."""
COSTS = {"memory_gib": "memory of a process, GiB", "step_s": "seconds a step"}


def format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


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


def learning_curves(
    trials: Sequence[Trial], best: Trial | None, max_steps: int, width: int = WIDTHS[0]
) -> Markup:
    """Mean Dice over folds at each stop; the bars of the best trial are the spread."""
    unit = 1000 if max_steps >= 10_000 else 1
    x, y = svg.Axis(0, max_steps / unit, 62, width - 20), _score_axis(trials, HEIGHT - 40, 14)
    marks = svg.x_axis(x, HEIGHT - 40, 14, "step" if unit == 1 else "thousand steps") + svg.y_axis(
        y, 62, width - 20, "mean Dice over folds"
    )
    by_id = {trial.id: trial for trial in trials}
    for trial in sorted(trials, key=lambda t: _kind(t, best) == "best"):
        kind = _kind(trial, best)
        curve = whole_curve(trial, by_id)
        own = curve if kind == "best" else curve[-len(trial.rungs) - 1 :]
        for one, two in pairwise(own):
            marks.append(
                svg.line(
                    x(one.step / unit),
                    y(one.score),
                    x(two.step / unit),
                    y(two.score),
                    f"curve {kind}",
                )
            )
        for rung in trial.rungs:
            if kind == "best":
                low, high = y(rung.score - rung.spread), y(rung.score + rung.spread)
                marks.append(
                    svg.line(x(rung.step / unit), low, x(rung.step / unit), high, "spread")
                )
            hint = f"trial {trial.number}, step {rung.step}: {rung.score:.4f} ± {rung.spread:.4f}, {rung.decision}"
            marks.append(svg.circle(x(rung.step / unit), y(rung.score), 3.6, f"dot {kind}", hint))
    return svg.picture(width, HEIGHT, marks, "Learning curves of the trials")


def whole_curve(trial: Trial, by_id: Mapping[str, Trial]) -> list[Rung]:
    """Its rungs, and before them those of the trials whose checkpoints it went on from."""
    rungs = list(trial.rungs)
    while trial.parent:
        until, trial = trial.from_step, by_id[trial.parent]
        rungs = [*(rung for rung in trial.rungs if rung.step <= until), *rungs]
    return rungs


def _place(dimension: Dimension, value: Any) -> float:
    """0 to 1 along a hyperparameter's range."""
    if dimension.values is not None:
        names = [format_value(v) for v in dimension.values]
        return 0.5 if len(names) == 1 else names.index(format_value(value)) / (len(names) - 1)
    low, high = dimension.low or 0.0, dimension.high or 0.0
    if dimension.type == "loguniform":
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def _labels(dimension: Dimension) -> list[tuple[float, str]]:
    if dimension.values is not None:
        return [(_place(dimension, value), format_value(value)) for value in dimension.values]
    return [(0.0, format_value(dimension.low)), (1.0, format_value(dimension.high))]


def parallel_coordinates(
    space: dict[str, Dimension], trials: Sequence[Trial], best: Trial | None
) -> Markup:
    """A line a trial through its hyperparameters to its last mean Dice."""
    width, top, bottom = 2 * WIDTH, 34, HEIGHT - 24
    score = _score_axis(trials, bottom, top)
    columns = [90 + i * (width - 180) / len(space) for i in range(len(space) + 1)]
    marks = [svg.line(x, top, x, bottom, "axis") for x in columns]
    marks.append(svg.text(columns[-1], 16, "mean Dice", "middle", "title"))
    marks += [
        svg.text(columns[-1] + 7, score(t) + 4, svg.shown(t), "start", "tick")
        for t in score.ticks()
    ]
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
                svg.line(
                    round(x1, 1),
                    round(y1, 1),
                    round(x2, 1),
                    round(y2, 1),
                    f"curve {_kind(trial, best)}",
                )
            )
        marks.append(
            svg.circle(
                round(points[-1][0], 1),
                round(points[-1][1], 1),
                3.6,
                f"dot {_kind(trial, best)}",
                _hint(trial),
            )
        )
    for x, (key, dimension) in zip(columns, space.items(), strict=False):
        marks.append(svg.text(x, 16, key, "middle", "title"))
        for share, name in _labels(dimension):
            marks.append(svg.text(x - 7, bottom - share * (bottom - top) + 4, name, "end", "tick"))
    return svg.picture(width, HEIGHT, marks, "Parallel coordinates of the trials")


def stacked_coordinates(
    space: dict[str, Dimension], trials: Sequence[Trial], best: Trial | None
) -> Markup:
    """`parallel_coordinates` for a narrow page: horizontal axes below each other, the score is the last."""
    left, right, step = 30, WIDTH - 30, 74
    score = _score_axis(trials, left, right)
    rows = [40 + step * i for i in range(len(space) + 1)]
    marks = [svg.line(left, y, right, y, "axis") for y in rows]
    curves: list[Markup] = []
    for trial in sorted(trials, key=lambda t: _kind(t, best) == "best"):
        if trial.score is None:
            continue
        kind = _kind(trial, best)
        points = []
        for y, (key, dimension) in zip(rows, space.items(), strict=False):
            if key in trial.params:
                points.append((left + _place(dimension, trial.params[key]) * (right - left), y))
        points.append((score(trial.score), rows[-1]))
        for (x1, y1), (x2, y2) in pairwise(points):
            curves.append(svg.line(round(x1, 1), y1, round(x2, 1), y2, f"curve {kind}"))
        curves.append(
            svg.circle(round(points[-1][0], 1), points[-1][1], 5, f"dot {kind}", _hint(trial))
        )
    marks += curves
    # Texts come last, so that lines do not cross them out.
    for y, (key, dimension) in zip(rows, space.items(), strict=False):
        marks.append(svg.text(WIDTH / 2, y - 14, key, "middle", "title"))
        for share, name in _labels(dimension):
            anchor = "start" if share < 0.1 else "end" if share > 0.9 else "middle"
            marks.append(svg.text(left + share * (right - left), y + 19, name, anchor, "tick"))
    marks.append(svg.text(WIDTH / 2, rows[-1] - 14, "mean Dice", "middle", "title"))
    marks += [
        svg.text(score(t), rows[-1] + 19, svg.shown(t), "middle", "tick") for t in score.ticks()
    ]
    return svg.picture(WIDTH, rows[-1] + 32, marks, "Parallel coordinates of the trials, stacked")


def scatter_chart(
    key: str, dimension: Dimension, trials: Sequence[Trial], best: Trial | None
) -> Markup:
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
            x = (
                axis(value)
                if dimension.values is None
                else 110 + _place(dimension, value) * (WIDTH - 180)
            )
            hint = f"{_hint(trial)}, {key} = {format_value(value)}"
            marks.append(
                svg.circle(round(x, 1), y(trial.score), 4, f"dot {_kind(trial, best)}", hint)
            )
    return svg.picture(WIDTH, HEIGHT, marks, f"Mean Dice over {key}")


def pareto_charts(
    objectives: Sequence[str], trials: Sequence[Trial], best: Trial | None, width: int = WIDTHS[0]
) -> list[Markup]:
    """Dice over each further objective; the line joins the trials that none beats in both."""
    made = []
    for name in objectives[1:]:
        pair = (objectives[0], name)
        points = {t.id: objective_values(t, pair) for t in trials if t.state == "finished"}
        if not points:
            continue
        y, values = _score_axis(trials, HEIGHT - 40, 14), [value for _, value in points.values()]
        margin = 0.08 * (max(values) - min(values)) or 0.1 * max(values)
        x = svg.Axis(max(0.0, min(values) - margin), max(values) + margin, 62, width - 20)
        marks = svg.x_axis(x, HEIGHT - 40, 14, COSTS[name]) + svg.y_axis(
            y, 62, width - 20, "mean Dice"
        )
        front = pareto_front(trials, pair)
        for one, two in pairwise(front):
            (dice_1, at_1), (dice_2, at_2) = points[one.id], points[two.id]
            marks.append(svg.line(x(at_1), y(dice_1), x(at_2), y(dice_2), "curve best"))
        for trial in trials:
            if trial.id in points:
                dice, at = points[trial.id]
                kind = "best" if trial in front else "finished"
                hint = f"trial {trial.number}: Dice {dice:.4f}, {name} {at:.4g}"
                marks.append(svg.circle(x(at), y(dice), 4.5, f"dot {kind}", hint))
        made.append(svg.picture(width, HEIGHT, marks, f"Mean Dice over {COSTS[name]}"))
    return made
