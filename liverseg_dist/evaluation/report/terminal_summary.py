"""Main figures of a finished evaluation as lines of text, printed by `evaluate` and `score`."""

from typing import Any

from liverseg_dist.evaluation.metrics.lesions import DETECTION_LABELS
from liverseg_dist.evaluation.metrics.registry import METRICS
from liverseg_dist.labels import STRUCTURES

RATIO_DIGITS = 4


def format_summary(summary: dict[str, Any]) -> list[str]:
    """One line a structure, then one line for each lesion detection threshold.

    Args:
        summary: From `summary.aggregate_scores`.
    """
    width = max(len(structure) for structure in STRUCTURES)
    lines = []
    for structure in STRUCTURES:
        figures = []
        for metric in METRICS:
            if metric.on_terminal:
                value = metric.format_value(summary[structure][metric.summary_key])
                figures.append(f"{metric.summary_title or metric.title} {value}")
        lines.append(f"{structure:{width}} {', '.join(figures)}")
    for threshold, label in DETECTION_LABELS.items():
        detection = summary["tumour"]["detection"][threshold]
        recall, precision = format_ratio(detection["recall"]), format_ratio(detection["precision"])
        lines.append(f"lesions {label}: recall {recall}, precision {precision}")
    return lines


def format_ratio(value: float | None) -> str:
    """A value between 0 and 1; `undefined` for None."""
    return "undefined" if value is None else f"{value:.{RATIO_DIGITS}f}"
