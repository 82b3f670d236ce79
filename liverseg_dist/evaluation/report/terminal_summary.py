"""Main figures of a finished evaluation as lines of text, printed by `evaluate` and `score`."""

from typing import Any

from liverseg_dist.evaluation.case_scores import lesions_of_summary, structures_of_summary
from liverseg_dist.evaluation.metrics.lesions import DETECTION_LABELS
from liverseg_dist.evaluation.metrics.registry import METRICS

RATIO_DIGITS = 4


def format_summary(summary: dict[str, Any]) -> list[str]:
    """One line a structure, then one line for each lesion detection threshold.

    Args:
        summary: From `summary.aggregate_scores`.
    """
    structures = structures_of_summary(summary)
    width = max(len(structure) for structure in structures)
    lines = []
    for structure in structures:
        figures = []
        for metric in METRICS:
            if metric.on_terminal:
                value = metric.format_value(summary[structure][metric.summary_key])
                figures.append(f"{metric.summary_title or metric.title} {value}")
        lines.append(f"{structure:{width}} {', '.join(figures)}")
    lesion_structures = lesions_of_summary(summary)
    for structure in lesion_structures:
        # With one lesion structure its name would add nothing.
        prefix = "" if len(lesion_structures) == 1 else f"{structure}: "
        for threshold, label in DETECTION_LABELS.items():
            found = summary[structure]["detection"][threshold]
            recall, precision = format_ratio(found["recall"]), format_ratio(found["precision"])
            lines.append(f"{prefix}lesions {label}: recall {recall}, precision {precision}")
    return lines


def format_ratio(value: float | None) -> str:
    """A value between 0 and 1; `undefined` for None."""
    return "undefined" if value is None else f"{value:.{RATIO_DIGITS}f}"
