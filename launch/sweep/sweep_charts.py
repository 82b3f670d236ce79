"""The charts of sweep.html: learning curves, parallel coordinates, Dice over a hyperparameter."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from liverseg_dist.evaluation.report import svg

from .journal import Rung, Trial
from .search import compute_objectives, find_pareto_front
from .sweep_config import Dimension

WIDTH, HEIGHT = 520, 250
WIDTHS = (2 * WIDTH, WIDTH)
"""Widths of the charts that fill the page: for a screen, and for a phone, on which a chart for a
screen would have texts too small to read."""
LEFT, RIGHT_MARGIN = 62, 20
TOP, BOTTOM = 14, HEIGHT - 40
COSTS = {"memory_gib": "memory of a process, GiB", "step_s": "seconds per step"}
"""Objective -> title of its axis."""


def format_value(value: Any) -> str:
    """A hyperparameter value for page and table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _style_of(trial: Trial, best: Trial | None) -> str:
    """The CSS class of a trial: best, or its state."""
    return "best" if best is not None and trial.id == best.id else trial.state


def _put_best_last(trials: Sequence[Trial], best: Trial | None) -> list[Trial]:
    """The order of drawing: the best trial is drawn over the others."""
    return sorted(trials, key=lambda trial: _style_of(trial, best) == "best")


def _format_hint(trial: Trial) -> str:
    """The text shown when the pointer is over a trial."""
    score = "no score" if trial.score is None else f"Dice {trial.score:.4f}"
    return f"trial {trial.number} ({trial.state}): {score}"


def _build_score_axis(trials: Sequence[Trial], start: float, stop: float) -> svg.Axis:
    """An axis for the scores of all rungs, with a margin."""
    scores: list[float] = []
    for trial in trials:
        scores += [rung.score for rung in trial.rungs]
    low, high = (min(scores), max(scores)) if scores else (0.0, 1.0)
    margin = max(0.01, 0.08 * (high - low))
    # Dice is between 0 and 1.
    return svg.Axis(max(0.0, low - margin), min(1.0, high + margin), start, stop)


def learning_curves(
    trials: Sequence[Trial], best: Trial | None, max_steps: int, width: int = WIDTHS[0]
) -> Markup:
    """Mean Dice over folds at each stop; the bars of the best trial are the spread over folds."""
    # The labels of large steps would overlap.
    unit = 1000 if max_steps >= 10_000 else 1
    title = "step" if unit == 1 else "thousand steps"
    right = width - RIGHT_MARGIN
    x = svg.Axis(0, max_steps / unit, LEFT, right)
    y = _build_score_axis(trials, BOTTOM, TOP)
    marks = svg.x_axis(x, BOTTOM, TOP, title)
    marks += svg.y_axis(y, LEFT, right, "mean Dice over folds")
    by_id = {trial.id: trial for trial in trials}
    for trial in _put_best_last(trials, best):
        style = _style_of(trial, best)
        curve = full_curve(trial, by_id)
        # Of other trials only the own part: that of the parent is drawn with the parent.
        shown = curve if style == "best" else curve[-len(trial.rungs) - 1 :]
        for one, two in pairwise(shown):
            x1, x2 = x(one.step / unit), x(two.step / unit)
            marks.append(svg.line(x1, y(one.score), x2, y(two.score), f"curve {style}"))
        for rung in trial.rungs:
            at = x(rung.step / unit)
            if style == "best":
                low, high = y(rung.score - rung.spread), y(rung.score + rung.spread)
                marks.append(svg.line(at, low, at, high, "spread"))
            hint = (
                f"trial {trial.number}, step {rung.step}: "
                f"{rung.score:.4f} ± {rung.spread:.4f}, {rung.decision}"
            )
            marks.append(svg.circle(at, y(rung.score), 3.6, f"dot {style}", hint))
    return svg.picture(width, HEIGHT, marks, "Learning curves of the trials")


def full_curve(trial: Trial, by_id: Mapping[str, Trial]) -> list[Rung]:
    """The rungs of a trial, after those of the trials from whose checkpoints it continued."""
    rungs = list(trial.rungs)
    while trial.parent:
        until, trial = trial.from_step, by_id[trial.parent]
        rungs = [*(rung for rung in trial.rungs if rung.step <= until), *rungs]
    return rungs


def _relative_position(dimension: Dimension, value: Any) -> float:
    """The position of a value in the range of a hyperparameter, 0 to 1."""
    if dimension.values is not None:
        names = [format_value(v) for v in dimension.values]
        return 0.5 if len(names) == 1 else names.index(format_value(value)) / (len(names) - 1)
    low, high = dimension.low or 0.0, dimension.high or 0.0
    if dimension.type == "loguniform":
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def _list_labels(dimension: Dimension) -> list[tuple[float, str]]:
    """(relative position, text) of the labels of an axis."""
    if dimension.values is not None:
        labels = []
        for value in dimension.values:
            labels.append((_relative_position(dimension, value), format_value(value)))
        return labels
    return [(0.0, format_value(dimension.low)), (1.0, format_value(dimension.high))]


def parallel_coordinates(
    space: dict[str, Dimension], trials: Sequence[Trial], best: Trial | None
) -> Markup:
    """A line per trial, through its hyperparameters to its last mean Dice."""
    width, top, bottom = 2 * WIDTH, 34, HEIGHT - 24
    length = bottom - top
    score = _build_score_axis(trials, bottom, top)
    columns = [90 + i * (width - 180) / len(space) for i in range(len(space) + 1)]
    last = columns[-1]
    marks = [svg.line(x, top, x, bottom, "axis") for x in columns]
    marks.append(svg.text(last, 16, "mean Dice", "middle", "title"))
    for tick in score.ticks():
        marks.append(svg.text(last + 7, score(tick) + 4, svg.shown(tick), "start", "tick"))
    for trial in _put_best_last(trials, best):
        if trial.score is None:
            continue
        points = []
        for x, (key, dimension) in zip(columns, space.items(), strict=False):
            if key in trial.params:
                share = _relative_position(dimension, trial.params[key])
                points.append((x, bottom - share * length))
        points.append((last, score(trial.score)))
        marks += _draw_trial(trial, points, _style_of(trial, best), radius=3.6)
    for x, (key, dimension) in zip(columns, space.items(), strict=False):
        marks.append(svg.text(x, 16, key, "middle", "title"))
        for share, name in _list_labels(dimension):
            marks.append(svg.text(x - 7, bottom - share * length + 4, name, "end", "tick"))
    return svg.picture(width, HEIGHT, marks, "Parallel coordinates of the trials")


def _draw_trial(
    trial: Trial, points: Sequence[tuple[float, float]], style: str, radius: float
) -> list[Markup]:
    """A line through points, with a dot at the last one."""
    rounded = [(round(x, 1), round(y, 1)) for x, y in points]
    marks = []
    for (x1, y1), (x2, y2) in pairwise(rounded):
        marks.append(svg.line(x1, y1, x2, y2, f"curve {style}"))
    marks.append(svg.circle(*rounded[-1], radius, f"dot {style}", _format_hint(trial)))
    return marks


def stacked_coordinates(
    space: dict[str, Dimension], trials: Sequence[Trial], best: Trial | None
) -> Markup:
    """`parallel_coordinates` for a narrow page: horizontal axes, the last one is the score."""
    left, right, step = 30, WIDTH - 30, 74
    length = right - left
    score = _build_score_axis(trials, left, right)
    rows = [40 + step * i for i in range(len(space) + 1)]
    last = rows[-1]
    marks = [svg.line(left, y, right, y, "axis") for y in rows]
    for trial in _put_best_last(trials, best):
        if trial.score is None:
            continue
        points: list[tuple[float, float]] = []
        for y, (key, dimension) in zip(rows, space.items(), strict=False):
            if key in trial.params:
                share = _relative_position(dimension, trial.params[key])
                points.append((left + share * length, y))
        points.append((score(trial.score), last))
        marks += _draw_trial(trial, points, _style_of(trial, best), radius=5)
    # Texts come last, so that lines do not cross them.
    for y, (key, dimension) in zip(rows, space.items(), strict=False):
        marks.append(svg.text(WIDTH / 2, y - 14, key, "middle", "title"))
        for share, name in _list_labels(dimension):
            anchor = "start" if share < 0.1 else "end" if share > 0.9 else "middle"
            marks.append(svg.text(left + share * length, y + 19, name, anchor, "tick"))
    marks.append(svg.text(WIDTH / 2, last - 14, "mean Dice", "middle", "title"))
    for tick in score.ticks():
        marks.append(svg.text(score(tick), last + 19, svg.shown(tick), "middle", "tick"))
    return svg.picture(WIDTH, last + 32, marks, "Parallel coordinates of the trials, stacked")


def scatter_chart(
    key: str, dimension: Dimension, trials: Sequence[Trial], best: Trial | None
) -> Markup:
    """Last mean Dice over one hyperparameter."""
    y = _build_score_axis(trials, BOTTOM, TOP)
    marks = svg.y_axis(y, LEFT, WIDTH - RIGHT_MARGIN, "mean Dice")
    axis = None
    choice_left, choice_length = 110, WIDTH - 180
    if dimension.low is not None and dimension.high is not None:
        is_log = dimension.type == "loguniform"
        axis = svg.Axis(dimension.low, dimension.high, 70, WIDTH - 28, log=is_log)
        marks += svg.x_axis(axis, BOTTOM, TOP, key)
    else:
        for share, name in _list_labels(dimension):
            x = choice_left + share * choice_length
            marks.append(svg.text(x, BOTTOM + 15, name, "middle", "tick"))
        marks.append(svg.text(WIDTH / 2 + 20, BOTTOM + 32, key, "middle", "title"))
    for trial in trials:
        if trial.score is None or key not in trial.params:
            continue
        value = trial.params[key]
        if axis is not None:
            x = axis(value)
        else:
            x = choice_left + _relative_position(dimension, value) * choice_length
        hint = f"{_format_hint(trial)}, {key} = {format_value(value)}"
        style = f"dot {_style_of(trial, best)}"
        marks.append(svg.circle(round(x, 1), y(trial.score), 4, style, hint))
    return svg.picture(WIDTH, HEIGHT, marks, f"Mean Dice over {key}")


def pareto_charts(
    objectives: Sequence[str], trials: Sequence[Trial], best: Trial | None, width: int = WIDTHS[0]
) -> list[Markup]:
    """Dice over each further objective; a line connects the trials that no other dominates."""
    charts = []
    for name in objectives[1:]:
        pair = (objectives[0], name)
        points: dict[str, list[float]] = {}
        for trial in trials:
            if trial.state == "finished":
                points[trial.id] = compute_objectives(trial, pair)
        if points:
            front = find_pareto_front(trials, pair)
            charts.append(_draw_pareto_chart(name, trials, points, front, width))
    return charts


def _draw_pareto_chart(
    name: str,
    trials: Sequence[Trial],
    points: Mapping[str, list[float]],
    front: Sequence[Trial],
    width: int,
) -> Markup:
    """Dice over one cost.

    Args:
        name: The objective on the x axis.
        trials: All trials.
        points: Trial id -> [Dice, cost], of the finished trials.
        front: The trials of the Pareto front.
        width: Width of the chart.
    """
    right = width - RIGHT_MARGIN
    costs = [cost for _, cost in points.values()]
    # All costs can be equal.
    margin = 0.08 * (max(costs) - min(costs)) or 0.1 * max(costs)
    x = svg.Axis(max(0.0, min(costs) - margin), max(costs) + margin, LEFT, right)
    y = _build_score_axis(trials, BOTTOM, TOP)
    marks = svg.x_axis(x, BOTTOM, TOP, COSTS[name])
    marks += svg.y_axis(y, LEFT, right, "mean Dice")
    for one, two in pairwise(front):
        (dice_1, cost_1), (dice_2, cost_2) = points[one.id], points[two.id]
        marks.append(svg.line(x(cost_1), y(dice_1), x(cost_2), y(dice_2), "curve best"))
    for trial in trials:
        if trial.id in points:
            dice, cost = points[trial.id]
            style = "best" if trial in front else "finished"
            hint = f"trial {trial.number}: Dice {dice:.4f}, {name} {cost:.4g}"
            marks.append(svg.circle(x(cost), y(dice), 4.5, f"dot {style}", hint))
    return svg.picture(width, HEIGHT, marks, f"Mean Dice over {COSTS[name]}")
