"""Lines about scores that `evaluate` and `score` both print."""

from collections.abc import Mapping, Sequence
from typing import Any

from liverseg_dist.evaluation.metrics.lesions import DETECTION_LABELS
from liverseg_dist.evaluation.notes import list_distance_notes


def format_figure(value: float | None, digits: int = 4, unit: str = "") -> str:
    """Format a metric; one that is not defined for any case is None."""
    return "undefined" if value is None else f"{value:.{digits}f}{unit}"


def print_detection(summary: Mapping[str, Any]) -> None:
    """Print recall and precision of tumours for each rule of matching."""
    for name, title in DETECTION_LABELS.items():
        counts = summary["tumour"]["detection"][name]
        recall = format_figure(counts["recall"])
        print(f"lesions {title}: recall {recall}, precision {format_figure(counts['precision'])}")


def print_notes(cases: Sequence[dict[str, Any]]) -> None:
    """Print how many cases have no distances, because a mask is empty."""
    for note in list_distance_notes(cases):
        print(f"note: {note}")
