"""Is one model better than another? Paired over the cases that both were scored on.

For each metric: the mean difference B - A with a bootstrap interval (cases resampled in pairs), and Wilcoxon's
signed-rank test, two-sided (Wilcoxon 1945, https://doi.org/10.2307/3001968; scipy). Several metrics are looked at
together, so p values are also given after Holm's correction (Holm 1979). Cases where a metric is undefined for either
are left out.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from liverseg_dist.errors import UserError
from liverseg_dist.evaluation.metrics.bootstrap import (
    LEVEL,
    RESAMPLES,
    SEED,
    mean_interval,
    resample_indices,
)
from liverseg_dist.evaluation.metrics.registry import METRICS, Metric
from liverseg_dist.evaluation.summary import compute_exact_mean
from liverseg_dist.labels import STRUCTURES

COMPARED = tuple(metric for metric in METRICS if metric.is_compared)
Case = dict[str, Any]


def compare_evaluations(first: Sequence[Case], second: Sequence[Case]) -> dict[str, Any]:
    """Compare two sets of scored cases; JSON-able. Raises `UserError` where they share no case.

    Each row of `metrics`: structure, metric, n, mean_a, mean_b, difference (B - A), ci95, p, p_holm, and in how many
    cases B is better, worse, equal (RVD by its absolute value). p is None with fewer than two differing cases.
    """
    by_id = [{case["case_id"]: case for case in cases} for cases in (first, second)]
    shared = sorted(by_id[0].keys() & by_id[1].keys())
    if not shared:
        raise UserError(
            "the two evaluations have no case in common; compare runs that were scored on the same cases"
        )
    rows = [
        _row(
            structure,
            metric,
            [
                (by_id[0][i][structure].get(metric.name), by_id[1][i][structure].get(metric.name))
                for i in shared
            ],
        )
        for structure in STRUCTURES
        for metric in COMPARED
    ]
    for row, adjusted in zip(rows, apply_holm_correction([row["p"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
    return {
        "n_cases": len(shared),
        "only_a": sorted(by_id[0].keys() - by_id[1].keys()),
        "only_b": sorted(by_id[1].keys() - by_id[0].keys()),
        "metrics": rows,
        "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED},
    }


def apply_holm_correction(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction; None stays None and does not count."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = highest
    return adjusted


def _row(
    structure: str, metric: Metric, pairs: Sequence[tuple[float | None, float | None]]
) -> dict[str, Any]:
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    differences = [b - a for a, b in known]
    gains = [metric.improvement(a, b) for a, b in known]
    values = np.array(differences, dtype=np.float64)
    return {
        "structure": structure,
        "metric": metric.name,
        "n": len(known),
        "mean_a": compute_exact_mean([a for a, _ in known]),
        "mean_b": compute_exact_mean([b for _, b in known]),
        "difference": compute_exact_mean(differences),
        "ci95": mean_interval(values, resample_indices(len(known))) if known else None,
        "p": _p_value(values),
        "better": sum(gain > 0 for gain in gains),
        "worse": sum(gain < 0 for gain in gains),
        "equal": sum(gain == 0 for gain in gains),
    }


def _p_value(differences: np.ndarray) -> float | None:
    differing = differences[differences != 0]
    if differing.size < 2:
        return None
    p = float(wilcoxon(differing, alternative="two-sided").pvalue)
    return p if math.isfinite(p) else None
