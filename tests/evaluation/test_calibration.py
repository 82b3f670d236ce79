"""Calibration against scikit-learn's bins and against itself in pieces."""

import json

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from liverseg_dist.evaluation import aggregate_scores, score_case
from liverseg_dist.evaluation.metrics.calibration import (
    BINS,
    LOWEST,
    CalibrationCounter,
    pool_calibration,
)
from liverseg_dist.evaluation.report.html_report import render_report
from tests.evaluation.masks import labels


def drawn(seed: int, sharpen: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and a truth that follows them (after `sharpen`, too boldly)."""
    rng = np.random.default_rng(seed)
    true_probability = rng.random((30, 31, 32))
    truth = rng.random(true_probability.shape) < true_probability
    odds = (true_probability / (1 - true_probability)) ** sharpen
    return (odds / (1 + odds)).astype(np.float32), truth


def counted(*pairs: tuple[np.ndarray, np.ndarray]) -> CalibrationCounter:
    counter = CalibrationCounter()
    for probability, truth in pairs:
        counter.add(probability, truth)
    return counter


def test_bins_match_scikit_learn() -> None:
    probability, truth = drawn(0)
    pooled = pool_calibration([counted((probability, truth)).counts()])
    kept = probability >= LOWEST
    share, mean = calibration_curve(truth[kept], probability[kept].astype(np.float64), n_bins=BINS)
    np.testing.assert_allclose(pooled["true_share"], share, rtol=1e-12)
    np.testing.assert_allclose(pooled["probability"], mean, atol=1e-6)
    weights = np.array(pooled["voxels"]) / kept.sum()
    assert pooled["ece"] == pytest.approx((weights * np.abs(share - mean)).sum(), abs=1e-6)


def test_overconfident_model_has_a_high_error() -> None:
    honest = pool_calibration([counted(drawn(1)).counts()])
    bold = pool_calibration([counted(drawn(1, sharpen=3.0)).counts()])
    assert honest["ece"] < 0.02 < 0.1 < bold["ece"]


def test_result_does_not_depend_on_slabs_or_order() -> None:
    probability, truth = drawn(2)
    whole = counted((probability, truth)).counts()
    slabs = [(probability[i : i + 7], truth[i : i + 7]) for i in range(0, 30, 7)]
    assert counted(*slabs[::-1]).counts() == whole


def test_error_without_voxels_is_undefined() -> None:
    pooled = pool_calibration([CalibrationCounter().counts()])
    assert pooled["ece"] is None
    assert pooled["true_share"] == [None] * BINS


def test_summary_and_report_contain_calibration() -> None:
    cases = [score_case(name, labels(1), labels(2), (1.0, 1.0, 1.0)) for name in "ab"]
    assert aggregate_scores(cases)["calibration"] == {}
    cases[0]["calibration"] = {"tumour": counted(drawn(3)).counts()}
    summary = aggregate_scores(cases)
    assert summary["calibration"]["tumour"]["n_cases"] == 1
    json.dumps(summary, allow_nan=False)
    assert "Expected calibration error" in render_report(summary, cases)
