"""Do the probabilities mean what they say? Reliability over bins, pooled exactly over cases.

Of all voxels that got a probability of about 0.7, 70 % should be what was predicted. Voxels are counted in bins of
equal width by their probability; the expected calibration error is the mean distance between a bin's probability and
its share of true voxels, weighted by voxels (Guo et al. 2017, https://arxiv.org/abs/1706.04599). Voxels below `LOWEST`
are left out: nearly all of a scan is certain background, which would hide everything else.

Sums of probabilities are kept as integers (millionths), so pooling does not depend on the order of slabs or cases.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

BINS = 20
LOWEST = 0.01
SCALE = 1_000_000
Counts = dict[str, list[int]]


class CalibrationCounter:
    """Adds up one structure of one case, slab by slab; `counts()` goes into the case's scores."""

    def __init__(self) -> None:
        self._voxels, self._positives, self._probability = np.zeros((3, BINS), dtype=np.int64)

    def add(self, probability: np.ndarray, truth: np.ndarray) -> None:
        """Probabilities 0..1 (any float type) and the true mask (boolean) of the same shape."""
        chosen = probability >= LOWEST
        values = probability[chosen].astype(np.float64)
        bins = np.minimum((values * BINS).astype(np.int64), BINS - 1)
        self._voxels += np.bincount(bins, minlength=BINS)
        self._positives += np.bincount(bins[truth[chosen]], minlength=BINS)
        millionths = np.rint(values * SCALE)  # whole numbers: float64 adds them exactly below 2**53
        self._probability += np.bincount(bins, weights=millionths, minlength=BINS).astype(np.int64)

    def counts(self) -> Counts:
        return {
            "voxels": self._voxels.tolist(),
            "positives": self._positives.tolist(),
            "probability_millionths": self._probability.tolist(),
        }


def pool_calibration(counts: Sequence[Counts]) -> dict[str, Any]:
    """`ece`, `n_cases` and per-bin `voxels`, `probability` (mean), `true_share`; None in empty bins."""
    voxels, positives, probability = (
        [sum(column) for column in zip(*(c[key] for c in counts), strict=True)]
        for key in ("voxels", "positives", "probability_millionths")
    )
    total = sum(voxels)
    gaps = sum(
        abs(p - SCALE * n) for p, n in zip(probability, positives, strict=True)
    )  # an integer: exact
    return {
        "n_cases": len(counts),
        "ece": gaps / (SCALE * total) if total else None,
        "voxels": voxels,
        "probability": [
            p / (SCALE * v) if v else None for p, v in zip(probability, voxels, strict=True)
        ],
        "true_share": [n / v if v else None for n, v in zip(positives, voxels, strict=True)],
    }
