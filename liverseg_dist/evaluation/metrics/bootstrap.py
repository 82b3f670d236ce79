"""Confidence intervals by resampling cases (percentile bootstrap; Efron & Tibshirani 1993, chapter 13).

Cases are drawn with replacement and every figure is recomputed from the drawn cases, so figures pooled over cases
(global Dice, lesion recall, burden RMSE) get intervals that respect that lesions of one patient belong together. The
draws depend on the seed and the number of cases only; cases come sorted by id, so the interval is the same whoever
computed them.
"""

from collections.abc import Callable

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
SEED = 20170914


def resample_indices(num_cases: int, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Case indices (resamples, num_cases)."""
    return np.random.default_rng(seed).integers(0, num_cases, size=(resamples, num_cases))


def percentile_interval(values: np.ndarray, level: float = LEVEL) -> list[float] | None:
    """Percentile interval of resampled figures; NaN (undefined in a draw) is left out; None if nothing is left."""
    defined = values[np.isfinite(values)]
    if defined.size == 0:
        return None
    tail = (1 - level) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return [float(low), float(high)]


def mean_interval(values: np.ndarray, indices: np.ndarray) -> list[float] | None:
    """Interval of the mean over cases; NaN marks a case where the metric is undefined."""
    return percentile_interval(
        _ratio(np.nan_to_num(values), np.isfinite(values).astype(np.float64), indices)
    )


def ratio_interval(
    numerators: np.ndarray, denominators: np.ndarray, indices: np.ndarray
) -> list[float] | None:
    """Interval of sum(numerators) / sum(denominators) over cases."""
    return percentile_interval(_ratio(numerators, denominators, indices))


def statistic_interval(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], indices: np.ndarray
) -> list[float] | None:
    """Interval of any statistic that maps (resamples, cases) to (resamples,)."""
    return percentile_interval(statistic(values[indices]))


def _ratio(numerators: np.ndarray, denominators: np.ndarray, indices: np.ndarray) -> np.ndarray:
    top = numerators[indices].sum(axis=1).astype(np.float64)
    bottom = denominators[indices].sum(axis=1).astype(np.float64)
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0)
