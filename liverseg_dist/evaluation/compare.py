"""Compare two models on the cases that both were scored on.

For each metric: the mean difference B - A with a bootstrap interval (cases are resampled in pairs),
and the two-sided signed-rank test of Wilcoxon (Wilcoxon 1945, https://doi.org/10.2307/3001968;
scipy). Several metrics are tested together, so p values are also given after Holm's correction
(Holm 1979). Cases where a metric is undefined for one of the models are left out.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from liverseg_dist.errors import UserError
from liverseg_dist.evaluation.case_scores import find_common_structures, find_scores
from liverseg_dist.evaluation.metrics.bootstrap import (
    LEVEL,
    RESAMPLES,
    SEED,
    mean_interval,
    resample_indices,
)
from liverseg_dist.evaluation.metrics.registry import METRICS, Metric
from liverseg_dist.evaluation.summary import compute_exact_mean

COMPARED = tuple(metric for metric in METRICS if metric.is_compared)
Case = dict[str, Any]


def compare_evaluations(first: Sequence[Case], second: Sequence[Case]) -> dict[str, Any]:
    """Compare two sets of scored cases.

    Args:
        first: Scored cases of model A.
        second: Scored cases of model B.

    Returns:
        A JSON-able dict. Each row of `metrics` has structure, metric, n, mean_a, mean_b, difference
        (B - A), ci95, p, p_holm, and the number of cases where B is better, worse or equal (RVD by
        its absolute value). p is None with fewer than two cases that differ.

    Raises:
        UserError: The evaluations have no case in common.
    """
    cases_a = {case["case_id"]: case for case in first}
    cases_b = {case["case_id"]: case for case in second}
    shared = sorted(cases_a.keys() & cases_b.keys())
    if not shared:
        raise UserError(
            "the two evaluations have no case in common; "
            "compare runs that were scored on the same cases"
        )
    rows: list[dict[str, Any]] = []
    structures_b = set(find_common_structures(second))
    for structure in find_common_structures(first):
        # Models with other structures are compared on those that both have.
        if structure not in structures_b:
            continue
        for metric in COMPARED:
            pairs = []
            for case_id in shared:
                scores_a = find_scores(cases_a[case_id], structure) or {}
                scores_b = find_scores(cases_b[case_id], structure) or {}
                pairs.append((scores_a.get(metric.name), scores_b.get(metric.name)))
            rows.append(_compare_metric(structure, metric, pairs))
    for row, adjusted in zip(rows, apply_holm_correction([row["p"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
    return {
        "n_cases": len(shared),
        "only_a": sorted(cases_a.keys() - cases_b.keys()),
        "only_b": sorted(cases_b.keys() - cases_a.keys()),
        "metrics": rows,
        "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED},
    }


def apply_holm_correction(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p values by Holm's step-down correction; None stays None and is not counted."""
    defined = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(defined):
        # An adjusted value must not be lower than that of a smaller p value.
        highest = max(highest, min(1.0, (len(defined) - rank) * p))
        adjusted[i] = highest
    return adjusted


def _compare_metric(
    structure: str, metric: Metric, pairs: Sequence[tuple[float | None, float | None]]
) -> dict[str, Any]:
    values_a: list[float] = []
    values_b: list[float] = []
    for a, b in pairs:
        # A paired test needs both values of a case.
        if a is not None and b is not None:
            values_a.append(a)
            values_b.append(b)
    n = len(values_a)
    differences: list[float] = []
    gains = np.zeros(n)
    for i, (a, b) in enumerate(zip(values_a, values_b, strict=True)):
        differences.append(b - a)
        gains[i] = metric.improvement(a, b)
    values = np.array(differences, dtype=np.float64)
    return {
        "structure": structure,
        "metric": metric.name,
        "n": n,
        "mean_a": compute_exact_mean(values_a),
        "mean_b": compute_exact_mean(values_b),
        "difference": compute_exact_mean(differences),
        "ci95": mean_interval(values, resample_indices(n)) if n else None,
        "p": _compute_p_value(values),
        "better": int((gains > 0).sum()),
        "worse": int((gains < 0).sum()),
        "equal": int((gains == 0).sum()),
    }


def _compute_p_value(differences: np.ndarray) -> float | None:
    # Wilcoxon's test leaves out pairs without a difference.
    differing = differences[differences != 0]
    if differing.size < 2:
        return None
    p = float(wilcoxon(differing, alternative="two-sided").pvalue)
    # JSON has no NaN: undefined is null.
    return p if math.isfinite(p) else None
