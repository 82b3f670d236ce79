"""Pool the scores of cases into the figures of `summary.json`.

The result has the same bits for any number of processes and restarts: cases are sorted by id and
summed with `math.fsum` (correctly rounded), and what is pooled over cases (global Dice, lesion
counts) is pooled as integers. A metric that is undefined for a case (None) is left out of its mean;
`n_defined` is the number of cases in the mean.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from liverseg_dist.evaluation.case_scores import (
    find_burden,
    find_common_structures,
    find_lesion_scores,
    find_scores,
    has_first_form_of,
    list_lesion_structures,
)
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
from liverseg_dist.evaluation.metrics.overlap import OverlapCounts, pool_dice
from liverseg_dist.evaluation.metrics.registry import CASE_METRICS

SCHEMA = 2
"""Schema 1 had no `structures`: its structures are those of LiTS."""
VOXEL_COUNTS = ("prediction_voxels", "truth_voxels", "intersection_voxels")
QUARTILES = ("min", "q25", "median", "q75", "max")
Case = dict[str, Any]


def aggregate_scores(cases: Iterable[Case]) -> dict[str, Any]:
    """Pool scored cases into a summary.

    Args:
        cases: From `case.score_case`. A case may also have `calibration`: for each structure
            `CalibrationCounter.counts()`.

    Returns:
        The summary, JSON-able.

    Raises:
        ValueError: Two cases have the same id.
    """
    ordered = sorted(cases, key=lambda case: case["case_id"])
    ids = [case["case_id"] for case in ordered]
    if len(set(ids)) != len(ids):
        raise ValueError("a case is scored twice")
    summary: dict[str, Any] = {"schema": SCHEMA, "n_cases": len(ordered)}
    # One set of draws for all figures: their intervals are then based on the same cases.
    indices = resample_indices(len(ordered)) if ordered else np.zeros((0, 0), dtype=int)
    structures = find_common_structures(ordered)
    summary["structures"] = list(structures)
    for structure in structures:
        scores = [find_scores(case, structure) for case in ordered]
        summary[structure] = _summarize_structure(scores, indices)
    for structure in list_lesion_structures(ordered):
        lesions = [find_lesion_scores(case, structure) for case in ordered]
        summary[structure]["detection"] = _summarize_detection(lesions, indices)
        summary[structure]["detected_lesions"] = _summarize_detected_lesions(lesions)
    for structure in structures:
        burdens = [find_burden(case, structure) for case in ordered]
        if any(burden is not None for burden in burdens):
            summary[structure]["burden"] = _summarize_burden(burdens, indices)
    if has_first_form_of(ordered):
        # Readers of schema 1 find the burden here.
        lesion = list_lesion_structures(ordered)[0]
        burdens = [find_burden(case, lesion) for case in ordered]
        summary["burden"] = _summarize_burden(burdens, indices)
    summary["calibration"] = _summarize_calibration(ordered, structures)
    summary["bootstrap"] = {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED}
    return summary


def compute_exact_mean(values: Sequence[float]) -> float | None:
    """Correctly rounded sum over the number of values; None without values."""
    return math.fsum(values) / len(values) if values else None


def _summarize_structure(
    all_scores: list[dict[str, Any] | None], indices: np.ndarray
) -> dict[str, Any]:
    """Figures of one structure; cases in which it was not annotated (None) are left out."""
    # The bootstrap draws from all cases: a missing value is NaN there.
    scores: list[dict[str, Any]] = [score or {} for score in all_scores]
    annotated = [score for score in all_scores if score is not None]
    summary: dict[str, Any] = {}
    intervals: dict[str, list[float] | None] = {}
    spread: dict[str, dict[str, float | None]] = {}
    n_defined: dict[str, int] = {}
    for metric in CASE_METRICS:
        key = metric.summary_key
        # Ledgers written before a metric was added lack its key.
        values = [score.get(metric.name) for score in scores]
        defined = [value for value in values if value is not None]
        summary[key] = compute_exact_mean(defined)
        n_defined[key] = len(defined)
        spread[key] = _compute_spread(defined)
        intervals[key] = mean_interval(_replace_none(values), indices) if scores else None
    # Global figures are pooled from integers, so they are exact in any order.
    counts = []
    for score in scores:
        prediction, truth, intersection = (int(score.get(name, 0)) for name in VOXEL_COUNTS)
        counts.append(OverlapCounts(prediction, truth, intersection))
    summary["dice_global"] = pool_dice(counts)
    intervals["dice_global"] = None
    if counts:
        numerators = np.array([2 * case.intersection for case in counts], dtype=np.int64)
        denominators = np.array([case.prediction + case.truth for case in counts], dtype=np.int64)
        intervals["dice_global"] = ratio_interval(numerators, denominators, indices)
    pooled = {name: sum(score[name] for score in annotated) for name in VOXEL_COUNTS}
    result = summary | {"ci95": intervals, "spread": spread}
    result |= {"n_defined": n_defined, "pooled": pooled}
    # Absent where all cases have the structure, as in schema 1.
    if len(annotated) < len(scores):
        result["n_annotated"] = len(annotated)
    return result


def _replace_none(values: Sequence[float | None]) -> np.ndarray:
    """float64 array with NaN for None, as the bootstrap needs it."""
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _compute_spread(values: list[float]) -> dict[str, float | None]:
    """Standard deviation (of a sample), extremes and quartiles; None where undefined."""
    if not values:
        return dict.fromkeys(("std", *QUARTILES))
    # Sorted first: the result must not depend on the order of the cases.
    quartiles = np.quantile(np.sort(np.array(values)), [0, 0.25, 0.5, 0.75, 1])
    std = None
    if len(values) > 1:
        mean = math.fsum(values) / len(values)
        squares = math.fsum((value - mean) ** 2 for value in values)
        std = math.sqrt(squares / (len(values) - 1))
    return {"std": std, **dict(zip(QUARTILES, map(float, quartiles), strict=True))}


def _summarize_detection(lesions: list[Case | None], indices: np.ndarray) -> dict[str, Any]:
    """Pooled lesion counts with precision, recall and F1, at each IoU threshold."""
    summary: dict[str, Any] = {}
    cases = [case for case in lesions if case is not None]
    for name in IOU_THRESHOLDS:
        tp_cases, fp_cases, fn_cases = (
            np.array(
                [0 if case is None else case["detection"][name][key] for case in lesions],
                dtype=np.int64,
            )
            for key in ("tp", "fp", "fn")
        )
        tp, fp, fn = int(tp_cases.sum()), int(fp_cases.sum()), int(fn_cases.sum())
        intervals: dict[str, list[float] | None] = {"precision": None, "recall": None}
        if cases:
            intervals["precision"] = ratio_interval(tp_cases, tp_cases + fp_cases, indices)
            intervals["recall"] = ratio_interval(tp_cases, tp_cases + fn_cases, indices)
        summary[name] = {
            "precision": _divide_counts(tp, tp + fp),
            "recall": _divide_counts(tp, tp + fn),
            "f1": _divide_counts(2 * tp, 2 * tp + fp + fn),
            "tp": tp,
            "fp": fp,
            "fn": fn,
            "recall_by_size": _compute_recall_by_size(cases, name),
            "ci95": intervals,
        }
    return summary


def _compute_recall_by_size(cases: list[Case], threshold_name: str) -> dict[str, Any]:
    """Recall of true lesions by equivalent diameter: all of them, and those in a detected pair."""
    lesions = dict.fromkeys(SIZE_CLASSES, 0)
    detected = dict.fromkeys(SIZE_CLASSES, 0)
    for case in cases:
        for lesion in case["lesions"]:
            if lesion["side"] == "truth":
                lesions[lesion["size_class"]] += 1
                detected[lesion["size_class"]] += bool(lesion[f"detected_{threshold_name}"])
    by_size = {}
    for name in SIZE_CLASSES:
        by_size[name] = {
            "recall": _divide_counts(detected[name], lesions[name]),
            "detected": detected[name],
            "lesions": lesions[name],
        }
    return by_size


def _summarize_detected_lesions(lesions: list[Case | None]) -> dict[str, Any]:
    """Means over all pairs with IoU above 0.5, pooled over cases.

    These are the lesion segmentation scores of the LiTS scorer.
    """
    pairs: list[dict[str, Any]] = []
    for case in lesions:
        if case is not None:
            pairs += case["detected_pairs"]
    summary: dict[str, Any] = {"n": len(pairs)}
    for metric in DETECTED_METRICS:
        defined = [pair[metric] for pair in pairs if pair[metric] is not None]
        summary[metric] = compute_exact_mean(defined)
    return summary


def _summarize_burden(
    burdens: list[dict[str, float | None] | None], indices: np.ndarray
) -> dict[str, Any]:
    errors = [None if burden is None else burden["error"] for burden in burdens]
    defined = [error for error in errors if error is not None]
    mean_square = compute_exact_mean([error**2 for error in defined])
    intervals: dict[str, list[float] | None] = {"rmse": None, "bias": None}
    if burdens:
        values = _replace_none(errors)
        intervals["rmse"] = statistic_interval(values, _root_mean_square, indices)
        intervals["bias"] = mean_interval(values, indices)
    return {
        "rmse": None if mean_square is None else math.sqrt(mean_square),
        "max_abs_error": max((abs(error) for error in defined), default=None),
        "bias": compute_exact_mean(defined),
        "n_defined": len(defined),
        "ci95": intervals,
    }


def _summarize_calibration(cases: list[Case], structures: Sequence[str]) -> dict[str, Any]:
    """Pooled calibration of each structure that any case has counts of."""
    summary = {}
    for structure in structures:
        counts = []
        for case in cases:
            if structure in case.get("calibration", {}):
                counts.append(case["calibration"][structure])
        if counts:
            summary[structure] = pool_calibration(counts)
    return summary


def _root_mean_square(drawn: np.ndarray) -> np.ndarray:
    """Of (resamples, cases) to (resamples,); NaN marks a case without a value."""
    defined = np.isfinite(drawn)
    count = defined.sum(axis=1)
    total = (np.where(defined, drawn, 0.0) ** 2).sum(axis=1)
    return np.sqrt(np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0))


def _divide_counts(numerator: int, denominator: int) -> float | None:
    return numerator / denominator if denominator else None
