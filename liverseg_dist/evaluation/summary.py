"""From the cases' scores to the figures of `summary.json`: exact, and the same whoever computed which case.

Cases are sorted by id and summed with `math.fsum`; what is pooled over cases (global Dice, lesion counts) is pooled as
integers. A metric that is undefined for a case (None) is left out of its mean, and `n_defined` says how many cases
were in. The order, the number of processes and restarts therefore cannot change a bit of the result.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from liverseg_dist.evaluation.metrics.bootstrap import (
    LEVEL,
    RESAMPLES,
    SEED,
    mean_interval,
    ratio_interval,
    resample_indices,
    statistic_interval,
)
from liverseg_dist.evaluation.metrics.calibration import pool_calibration
from liverseg_dist.evaluation.metrics.lesions import DETECTED_METRICS, IOU_THRESHOLDS, SIZE_CLASSES
from liverseg_dist.evaluation.metrics.registry import CASE_METRICS
from liverseg_dist.labels import STRUCTURES

SCHEMA = 1
Case = dict[str, Any]


def aggregate_scores(cases: Iterable[Case]) -> dict[str, Any]:
    """The summary of scored cases (`case.score_case`), JSON-able. Raises ValueError on a case id given twice.

    A case may carry `calibration`: {structure: `CalibrationCounter.counts()`}.
    """
    ordered = sorted(cases, key=lambda case: case["case_id"])
    ids = [case["case_id"] for case in ordered]
    if len(set(ids)) != len(ids):
        raise ValueError("a case is scored twice")
    summary: dict[str, Any] = {"schema": SCHEMA, "n_cases": len(ordered)}
    indices = resample_indices(len(ordered)) if ordered else np.zeros((0, 0), dtype=int)
    for structure in STRUCTURES:
        summary[structure] = _structure_summary([case[structure] for case in ordered], indices)
    summary["tumour"]["detection"] = _detection_summary(ordered, indices)
    summary["tumour"]["detected_lesions"] = _detected_lesions(ordered)
    summary["burden"] = _burden_summary(ordered, indices)
    summary["calibration"] = {
        structure: pool_calibration(counts)
        for structure in STRUCTURES
        if (
            counts := [
                case["calibration"][structure]
                for case in ordered
                if structure in case.get("calibration", {})
            ]
        )
    }
    summary["bootstrap"] = {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED}
    return summary


def compute_exact_mean(values: Sequence[float]) -> float | None:
    """Correctly rounded sum over the number of values; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def _structure_summary(scores: list[dict[str, Any]], indices: np.ndarray) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    intervals: dict[str, list[float] | None] = {}
    spread: dict[str, dict[str, float | None]] = {}
    n_defined: dict[str, int] = {}
    for metric in CASE_METRICS:
        key = metric.summary_key
        # Ledgers written before a metric was added lack its key.
        found = [score.get(metric.name) for score in scores]
        defined = [value for value in found if value is not None]
        summary[key] = compute_exact_mean(defined)
        n_defined[key] = len(defined)
        spread[key] = _spread(defined)
        values = np.array(
            [math.nan if value is None else value for value in found], dtype=np.float64
        )
        intervals[key] = mean_interval(values, indices) if scores else None
    twice_shared = np.array([2 * score["intersection_voxels"] for score in scores], dtype=np.int64)
    total = np.array(
        [score["prediction_voxels"] + score["truth_voxels"] for score in scores], dtype=np.int64
    )
    summary["dice_global"] = _ratio(int(twice_shared.sum()), int(total.sum()))
    intervals["dice_global"] = ratio_interval(twice_shared, total, indices) if scores else None
    pooled = {
        f"{name}_voxels": sum(score[f"{name}_voxels"] for score in scores) for name in _VOXELS
    }
    return summary | {"ci95": intervals, "spread": spread, "n_defined": n_defined, "pooled": pooled}


_VOXELS = ("prediction", "truth", "intersection")


def _spread(values: list[float]) -> dict[str, float | None]:
    if not values:
        return dict.fromkeys(("std", "min", "q25", "median", "q75", "max"))
    quartiles = [float(q) for q in np.quantile(np.sort(np.array(values)), [0, 0.25, 0.5, 0.75, 1])]
    mean = math.fsum(values) / len(values)
    std = (
        math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
        if len(values) > 1
        else None
    )
    return {"std": std, **dict(zip(("min", "q25", "median", "q75", "max"), quartiles, strict=True))}


def _detection_summary(cases: list[Case], indices: np.ndarray) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for name in IOU_THRESHOLDS:
        counts = {
            key: np.array([case["detection"][name][key] for case in cases], dtype=np.int64)
            for key in _COUNTS
        }
        tp, fp, fn = (int(counts[key].sum()) for key in _COUNTS)
        summary[name] = {
            "precision": _ratio(tp, tp + fp),
            "recall": _ratio(tp, tp + fn),
            "f1": _ratio(2 * tp, 2 * tp + fp + fn),
            "tp": tp,
            "fp": fp,
            "fn": fn,
            "recall_by_size": _recall_by_size(cases, name),
            "ci95": {
                "precision": ratio_interval(counts["tp"], counts["tp"] + counts["fp"], indices)
                if cases
                else None,
                "recall": ratio_interval(counts["tp"], counts["tp"] + counts["fn"], indices)
                if cases
                else None,
            },
        }
    return summary


_COUNTS = ("tp", "fp", "fn")


def _recall_by_size(cases: list[Case], threshold_name: str) -> dict[str, Any]:
    """True lesions by equivalent diameter: how many there are and how many are in a detected pair."""
    lesions = [lesion for case in cases for lesion in case["lesions"] if lesion["side"] == "truth"]
    by_size = {}
    for name in SIZE_CLASSES:
        own = [
            lesion[f"detected_{threshold_name}"]
            for lesion in lesions
            if lesion["size_class"] == name
        ]
        by_size[name] = {
            "recall": _ratio(sum(own), len(own)),
            "detected": sum(own),
            "lesions": len(own),
        }
    return by_size


def _detected_lesions(cases: list[Case]) -> dict[str, Any]:
    """Means over all pairs with IoU above 0.5, pooled over cases (the LiTS scorer's lesion segmentation scores)."""
    pairs = [pair for case in cases for pair in case["detected_pairs"]]
    means = {
        m: compute_exact_mean([pair[m] for pair in pairs if pair[m] is not None])
        for m in DETECTED_METRICS
    }
    return {"n": len(pairs), **means}


def _burden_summary(cases: list[Case], indices: np.ndarray) -> dict[str, Any]:
    defined = [case["burden"]["error"] for case in cases if case["burden"]["error"] is not None]
    mean_square = compute_exact_mean([error**2 for error in defined])
    values = np.array(
        [math.nan if case["burden"]["error"] is None else case["burden"]["error"] for case in cases]
    )
    return {
        "rmse": None if mean_square is None else math.sqrt(mean_square),
        "max_abs_error": max((abs(error) for error in defined), default=None),
        "bias": compute_exact_mean(defined),
        "n_defined": len(defined),
        "ci95": {
            "rmse": statistic_interval(values, _root_mean_square, indices) if cases else None,
            "bias": mean_interval(values, indices) if cases else None,
        },
    }


def _root_mean_square(drawn: np.ndarray) -> np.ndarray:
    known = np.isfinite(drawn)
    count = known.sum(axis=1)
    total = (np.where(known, drawn, 0.0) ** 2).sum(axis=1)
    return np.sqrt(np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0))


def _ratio(numerator: int, denominator: int) -> float | None:
    return numerator / denominator if denominator else None
