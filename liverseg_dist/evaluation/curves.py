"""A run's training curves for its report: loss, validation Dice and learning rate, from `metrics.jsonl`.

They are kept beside the results (`training.json`), so that the report can be made again without the run.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

import liverseg_dist.evaluation.report.svg as svg
from liverseg_dist.labels import STRUCTURES

TRAINING = "training.json"
METRICS_FILE = "metrics.jsonl"
LOSS, LEARNING_RATE = "train/loss", "train/learning_rate"
DICE = {structure: f"validation/dice_{structure}" for structure in STRUCTURES}
KEPT = (LOSS, LEARNING_RATE, *DICE.values())
MAX_POINTS = 400
WIDTH, HEIGHT = 520, 250
Curves = dict[str, list[list[float]]]
"""For each metric [step, value] in the order of steps."""


def read_curves(run: Path) -> Curves:
    """The curves of a run's `metrics.jsonl`; empty where it has none.

    Lines that are damaged are left out. A longer curve is thinned to `MAX_POINTS`, the last point stays.
    """
    try:
        lines = (run / METRICS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[str, dict[int, float]] = {name: {} for name in KEPT}
    for line in lines:
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        for name in KEPT:
            if _is_figure(row.get(name)):
                found[name][step] = float(row[name])
    curves = {
        name: [[step, by_step[step]] for step in sorted(by_step)] for name, by_step in found.items()
    }
    return {name: _thin(points) for name, points in curves.items() if points}


def load_training(folder: Path) -> dict[str, Curves]:
    """Curves by run from `folder/training.json`; empty where it is missing or damaged."""
    try:
        content = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
        return {str(run): _checked(curves) for run, curves in content.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def draw_curves(curves: Curves) -> dict[str, Markup]:
    """Charts by title; one without two points is left out."""
    named = {
        "Training loss": (("loss", curves.get(LOSS, [])),),
        "Validation Dice": tuple(
            (structure, curves.get(key, [])) for structure, key in DICE.items()
        ),
        "Learning rate": (("rate", curves.get(LEARNING_RATE, [])),),
    }
    charts = {title: _line_chart(title, series) for title, series in named.items()}
    return {title: chart for title, chart in charts.items() if chart is not None}


def _line_chart(title: str, series: Sequence[tuple[str, list[list[float]]]]) -> Markup | None:
    points = [point for _, line in series for point in line]
    steps = [step for step, _ in points]
    if len(points) < 2 or min(steps) == max(steps):
        return None
    values = [value for _, value in points]
    low = min(0.0, *values)
    high = 1.0 if title == "Validation Dice" else svg.nice_high(values, 1e-12)
    x = svg.Axis(0, max(steps), 66, WIDTH - 20)
    y = svg.Axis(low, high, HEIGHT - 46, 14)
    marks = svg.x_axis(x, HEIGHT - 46, 14, "step") + svg.y_axis(y, 66, WIDTH - 20, title.lower())
    for name, line in series:
        places = [(x(step), y(value)) for step, value in line]
        marks.append(svg.polyline(places, f"curve {name}"))
        if len(places) <= 60:
            for (step, value), (left, top) in zip(line, places, strict=True):
                marks.append(
                    svg.circle(left, top, 3.0, f"dot {name}", f"{name}, step {step:g}: {value:.4g}")
                )
    return svg.picture(WIDTH, HEIGHT, marks, f"{title} over training steps")


def _thin(points: list[list[float]]) -> list[list[float]]:
    if len(points) <= MAX_POINTS:
        return points
    every = math.ceil((len(points) - 1) / (MAX_POINTS - 1))
    return [*points[:-1:every], points[-1]]


def _checked(curves: Mapping[str, Any]) -> Curves:
    kept: Curves = {}
    for name in KEPT:
        rows = [
            [float(step), float(value)] for step, value in curves.get(name, []) if _is_figure(value)
        ]
        if rows:
            kept[name] = rows
    return kept


def _is_figure(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
