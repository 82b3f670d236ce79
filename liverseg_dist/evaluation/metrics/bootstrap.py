"""Confidence intervals by resampling cases.

Method: percentile bootstrap (Efron & Tibshirani 1993, chapter 13). Cases are drawn with replacement
and every figure is computed again from the drawn cases. Figures pooled over cases (global Dice,
lesion recall, burden RMSE) thus get intervals that treat the lesions of one patient as dependent.
The draws depend only on the seed and the number of cases, and cases are sorted by id, so an
interval is the same for any number of processes.
"""

from collections.abc import Callable

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
SEED = 20170914


def resample_indices(num_cases: int, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Draw cases with replacement: indices (resamples, num_cases)."""
    return np.random.default_rng(seed).integers(0, num_cases, size=(resamples, num_cases))


def percentile_interval(values: np.ndarray, level: float = LEVEL) -> list[float] | None:
    """Percentile interval of resampled figures.

    Args:
        values: One value a draw; NaN marks a draw where the figure is undefined.
        level: Share of the draws inside the interval.

    Returns:
        [low, high]; None where no draw has a value.
    """
    defined = values[np.isfinite(values)]
    if defined.size == 0:
        return None
    tail = (1 - level) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return [float(low), float(high)]


def mean_interval(values: np.ndarray, indices: np.ndarray) -> list[float] | None:
    """Interval of the mean over cases; NaN marks a case where the metric is undefined."""
    is_defined = np.isfinite(values).astype(np.float64)
    return percentile_interval(_divide_sums(np.nan_to_num(values), is_defined, indices))


def ratio_interval(
    numerators: np.ndarray, denominators: np.ndarray, indices: np.ndarray
) -> list[float] | None:
    """Interval of sum(numerators) / sum(denominators) over cases."""
    return percentile_interval(_divide_sums(numerators, denominators, indices))


def statistic_interval(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], indices: np.ndarray
) -> list[float] | None:
    """Interval of any statistic that maps (resamples, cases) to (resamples,)."""
    return percentile_interval(statistic(values[indices]))


def _divide_sums(
    numerators: np.ndarray, denominators: np.ndarray, indices: np.ndarray
) -> np.ndarray:
    """Sum of the drawn numerators over that of the denominators; NaN where the latter is 0."""
    numerator = numerators[indices].sum(axis=1).astype(np.float64)
    denominator = denominators[indices].sum(axis=1).astype(np.float64)
    undefined = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator > 0)
