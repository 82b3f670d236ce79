"""Growth rates with their intervals, and the measurement error behind them."""

import math

import numpy as np
import pytest

from liverseg_dist.clinical.growth import diameter_sd_mm, exceeds_error, fit_growth, volume_sd_ml


def test_doubling_time_of_two_dates() -> None:
    growth = fit_growth([0, 90], [4.0, 8.0], [0.2, 0.4])
    assert growth is not None
    assert growth.doubling_days == pytest.approx(90)
    low, high = growth.doubling_interval
    assert low is not None
    assert high is not None
    assert low < 90 < high
    # The error of a ratio of two volumes with 5 % each.
    sd = math.hypot(0.05, 0.05) / 90
    assert growth.rate_interval[0] == pytest.approx(math.log(2) / 90 - 1.96 * sd)
    assert growth.is_significant


def test_a_change_within_the_error_has_no_longest_doubling_time() -> None:
    growth = fit_growth([0, 30], [4.0, 4.1], [0.4, 0.4])
    assert growth is not None
    assert not growth.is_significant
    assert growth.doubling_interval[1] is None


def test_shrinking_halves() -> None:
    growth = fit_growth([0, 60], [8.0, 4.0], [0.1, 0.1])
    assert growth is not None
    assert growth.doubling_days == pytest.approx(-60)
    assert all(end is not None and end < 0 for end in growth.doubling_interval)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    days = np.array([0.0, 40.0, 80.0, 120.0])
    covered = 0
    for _ in range(400):
        truth = 5.0 * np.exp(0.006 * days)
        sds = 0.06 * truth
        growth = fit_growth(days.tolist(), (truth + rng.normal(0, sds)).tolist(), sds.tolist())
        assert growth is not None
        covered += growth.rate_interval[0] <= 0.006 <= growth.rate_interval[1]
    assert covered / 400 >= 0.93


def test_the_right_model_is_chosen() -> None:
    days = [0.0, 50.0, 100.0, 150.0, 200.0]
    for name, volumes in (
        ("exponential", [2 * math.exp(0.012 * day) for day in days]),
        ("linear diameter", [(1 + 0.01 * day) ** 3 for day in days]),
        ("linear volume", [1.0 + 0.1 * day for day in days]),
    ):
        growth = fit_growth(days, volumes, [0.02 * volume for volume in volumes])
        assert growth is not None
        assert growth.best_model == name
    short = fit_growth([0, 50], [1.0, 2.0], [0.1, 0.1])
    assert short is not None
    assert short.best_model is None


def test_nothing_to_fit() -> None:
    assert fit_growth([0, 30], [0.0, 2.0], [0.0, 0.1]) is None
    assert fit_growth([0], [2.0], [0.1]) is None


def test_published_reproducibility_is_the_floor() -> None:
    """With voxels of no size the limits of a change are those of same-day repeat scans."""
    assert 1.96 * math.sqrt(2) * diameter_sd_mm(100.0, 0.0, 0.0) == pytest.approx(6.75)
    assert 1.96 * math.sqrt(2) * volume_sd_ml(100.0, 0.0) == pytest.approx(12.75)
    assert diameter_sd_mm(10.0, 0.8, 5.0) > diameter_sd_mm(10.0, 0.8, 1.0)
    assert not exceeds_error(1.0, 0.5, 0.5)
    assert exceeds_error(1.5, 0.5, 0.5)
