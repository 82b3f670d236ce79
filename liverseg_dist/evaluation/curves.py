"""Training curves of a run for its report: loss, validation Dice and learning rate.

They are read from the run's `metrics.jsonl` and stored next to the results (`training.json`), so
that the report can be written again without the run.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

import liverseg_dist.evaluation.report.svg as svg

TRAINING = "training.json"
METRICS_FILE = "metrics.jsonl"
LOSS, LEARNING_RATE = "train/loss", "train/learning_rate"
DICE_PREFIX = "validation/dice_"
"""Followed by the name of a structure."""
POOLED_DICE = "global_"
"""Starts the name of a tag of Dice pooled over cases, which is not drawn."""
MAX_POINTS = 400
MAX_DOTS = 60
"""A longer curve is drawn as a line without dots."""
WIDTH, HEIGHT = 520, 250
Curves = dict[str, list[list[float]]]
"""For each metric [step, value] in the order of steps."""


def read_curves(run: Path) -> Curves:
    """Read the curves of a run from its `metrics.jsonl`.

    Damaged lines are left out. A longer curve is thinned to `MAX_POINTS`; its last point stays.

    Returns:
        Curves by metric; empty where the run has no such file.
    """
    try:
        lines = (run / METRICS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    # By step: a resumed run may have written a step twice, the later value counts.
    values: dict[str, dict[int, float]] = {LOSS: {}, LEARNING_RATE: {}}
    for line in lines:
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        for name, value in row.items():
            if _is_curve(name) and _is_finite_number(value):
                values.setdefault(name, {})[step] = float(value)
    curves: Curves = {}
    for name, by_step in values.items():
        if by_step:
            curves[name] = _thin_points([[step, by_step[step]] for step in sorted(by_step)])
    return curves


def load_training(folder: Path) -> dict[str, Curves]:
    """Curves by run from `folder/training.json`; empty where the file is missing or damaged."""
    try:
        content = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
        return {str(run): _select_valid_curves(curves) for run, curves in content.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def draw_curves(curves: Curves, kinds: Mapping[str, str]) -> dict[str, Markup]:
    """Draw the charts of a run, by title; a chart with fewer than two points is left out.

    Args:
        curves: Curves by metric.
        kinds: Classes of the marks of each structure.
    """
    dice = []
    for name, points in curves.items():
        if name.startswith(DICE_PREFIX):
            dice.append((name.removeprefix(DICE_PREFIX), points))
    series_by_title = {
        "Training loss": [("loss", curves.get(LOSS, []))],
        "Validation Dice": dice,
        "Learning rate": [("rate", curves.get(LEARNING_RATE, []))],
    }
    charts = {}
    for title, series in series_by_title.items():
        chart = _draw_line_chart(title, series, kinds)
        if chart is not None:
            charts[title] = chart
    return charts


def _draw_line_chart(
    title: str, series: Sequence[tuple[str, list[list[float]]]], kinds: Mapping[str, str]
) -> Markup | None:
    points = [point for _, line in series for point in line]
    steps = [step for step, _ in points]
    if len(points) < 2 or min(steps) == max(steps):
        return None
    values = [value for _, value in points]
    # The axis includes 0; a negative loss extends it.
    low = min(0.0, *values)
    high = 1.0 if title == "Validation Dice" else svg.nice_high(values, 1e-12)
    x = svg.Axis(0, max(steps), 66, WIDTH - 20)
    y = svg.Axis(low, high, HEIGHT - 46, 14)
    marks = svg.x_axis(x, HEIGHT - 46, 14, "step")
    marks += svg.y_axis(y, 66, WIDTH - 20, title.lower())
    for name, line in series:
        positions = [(x(step), y(value)) for step, value in line]
        kind = kinds.get(name, name)
        marks.append(svg.polyline(positions, f"curve {kind}"))
        if len(positions) > MAX_DOTS:
            continue
        for (step, value), (left, top) in zip(line, positions, strict=True):
            hint = f"{name}, step {step:g}: {value:.4g}"
            marks.append(svg.circle(left, top, 3.0, f"dot {kind}", hint))
    return svg.picture(WIDTH, HEIGHT, marks, f"{title} over training steps")


def _thin_points(points: list[list[float]]) -> list[list[float]]:
    if len(points) <= MAX_POINTS:
        return points
    # The first and the last point stay; those between are taken at equal distances.
    every = math.ceil((len(points) - 1) / (MAX_POINTS - 1))
    return [*points[:-1:every], points[-1]]


def _select_valid_curves(curves: Mapping[str, Any]) -> Curves:
    """The known curves with their finite values: the file may have been edited."""
    valid: Curves = {}
    for name, entries in curves.items():
        if not _is_curve(name):
            continue
        points = []
        for step, value in entries:
            if _is_finite_number(value):
                points.append([float(step), float(value)])
        if points:
            valid[name] = points
    return valid


def _is_curve(name: object) -> bool:
    if not isinstance(name, str):
        return False
    structure = name.removeprefix(DICE_PREFIX)
    is_dice = structure != name and not structure.startswith(POOLED_DICE)
    return is_dice or name in (LOSS, LEARNING_RATE)


def _is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
