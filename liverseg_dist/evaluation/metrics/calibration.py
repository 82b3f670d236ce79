"""Calibration of the predicted probabilities, in bins, pooled exactly over cases.

Of all voxels with a predicted probability of about 0.7, 70 % should have the structure. Voxels are
counted in bins of equal width by their probability. The expected calibration error is the mean
distance between a bin's probability and its share of true voxels, weighted by voxels (Guo et al.
2017, https://arxiv.org/abs/1706.04599). Voxels below `LOWEST` are left out: nearly all of a scan is
certain background, which would dominate the error.

Sums of probabilities are integers (millionths), so pooling does not depend on the order of slabs or
cases.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

BINS = 20
LOWEST = 0.01
SCALE = 1_000_000
Counts = dict[str, list[int]]


class CalibrationCounter:
    """Counts voxels of one structure of one case, slab by slab, for the scores of the case."""

    def __init__(self) -> None:
        self._voxels, self._positives, self._probability = np.zeros((3, BINS), dtype=np.int64)

    def add(self, probability: np.ndarray, truth: np.ndarray) -> None:
        """Add a slab.

        Args:
            probability: Probabilities 0..1, any float type.
            truth: True mask (boolean) of the same shape.
        """
        chosen = probability >= LOWEST
        values = probability[chosen].astype(np.float64)
        # Probability 1 belongs to the last bin.
        bins = np.minimum((values * BINS).astype(np.int64), BINS - 1)
        self._voxels += np.bincount(bins, minlength=BINS)
        self._positives += np.bincount(bins[truth[chosen]], minlength=BINS)
        # Whole numbers: float64 adds them exactly below 2**53.
        millionths = np.rint(values * SCALE)
        self._probability += np.bincount(bins, weights=millionths, minlength=BINS).astype(np.int64)

    def counts(self) -> Counts:
        """Counts per bin, JSON-able."""
        return {
            "voxels": self._voxels.tolist(),
            "positives": self._positives.tolist(),
            "probability_millionths": self._probability.tolist(),
        }


def pool_calibration(counts: Sequence[Counts]) -> dict[str, Any]:
    """Pool the counts of cases.

    Returns:
        `ece` (expected calibration error), `n_cases`, and for each bin `voxels`, `probability`
        (mean) and `true_share`; the latter two are None in empty bins.
    """
    voxels = _sum_bins(counts, "voxels")
    positives = _sum_bins(counts, "positives")
    millionths = _sum_bins(counts, "probability_millionths")
    probability: list[float | None] = []
    true_share: list[float | None] = []
    # The sum of the gaps is an integer, so it is exact.
    gaps = 0
    for in_bin, true, total_probability in zip(voxels, positives, millionths, strict=True):
        gaps += abs(total_probability - SCALE * true)
        probability.append(total_probability / (SCALE * in_bin) if in_bin else None)
        true_share.append(true / in_bin if in_bin else None)
    total = sum(voxels)
    return {
        "n_cases": len(counts),
        "ece": gaps / (SCALE * total) if total else None,
        "voxels": voxels,
        "probability": probability,
        "true_share": true_share,
    }


def _sum_bins(counts: Sequence[Counts], key: str) -> list[int]:
    totals = [0] * BINS
    for case in counts:
        for number, value in enumerate(case[key]):
            totals[number] += value
    return totals
