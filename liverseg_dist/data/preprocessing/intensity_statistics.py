"""Outliers and normalisation: one clip and one affine for the whole data set, from an exact histogram of its liver.

A `HuHistogram` counts whole HU, so pooling cases is addition: the same numbers in whatever order and by however many
workers. `choose_intensity` turns the pooled histogram into the `IntensityConfig` that is recorded in the store and applied
on the device: clip, map to [0, 1], then subtract the mean and divide by the standard deviation.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from liverseg_dist.config import CleaningConfig, IntensityConfig
from liverseg_dist.errors import UserError

LOWEST, HIGHEST = -32768, 32767
MAD_TO_SIGMA = 1.482602218505602
"""Normal distribution: standard deviation over median absolute deviation."""


@dataclass(frozen=True, eq=False)
class HuHistogram:
    """How often each whole HU occurs."""

    counts: np.ndarray = field(
        default_factory=lambda: np.zeros(HIGHEST - LOWEST + 1, dtype=np.int64)
    )

    @classmethod
    def of(cls, values_hu: np.ndarray) -> "HuHistogram":
        """Of int16 voxels of any shape."""
        if values_hu.dtype != np.int16:
            raise ValueError(f"a histogram counts int16 HU, not {values_hu.dtype}")
        return cls(
            np.bincount(
                values_hu.reshape(-1).astype(np.int32) - LOWEST, minlength=HIGHEST - LOWEST + 1
            )
        )

    def __add__(self, other: "HuHistogram") -> "HuHistogram":
        return HuHistogram(self.counts + other.counts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HuHistogram) and np.array_equal(self.counts, other.counts)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def quantile(self, percent: float) -> float:
        """As `numpy.percentile` (linear) of all the voxels."""
        if not self.total:
            raise ValueError("an empty histogram has no percentiles")
        place = percent / 100 * (self.total - 1)
        below = math.floor(place)
        ends = np.cumsum(self.counts)
        low, high = (
            int(np.searchsorted(ends, rank, side="right")) + LOWEST
            for rank in (below, math.ceil(place))
        )
        return low + (high - low) * (place - below)

    def moments(self, lower: float = -math.inf, upper: float = math.inf) -> tuple[float, float]:
        """(mean, standard deviation) after clipping; the same bits in whatever order cases were added."""
        hu, counts = self._used()
        clipped = np.clip(hu, lower, upper)
        mean = math.fsum(n * v for n, v in zip(counts, clipped, strict=True)) / self.total
        variance = (
            math.fsum(n * (v - mean) ** 2 for n, v in zip(counts, clipped, strict=True))
            / self.total
        )
        return mean, math.sqrt(variance)

    def median_deviation(self) -> float:
        """Median of |v - median|."""
        hu, counts = self._used()
        away = np.abs(hu - self.quantile(50))
        order = np.argsort(away, kind="stable")
        ends = np.cumsum(counts[order])
        ranks = ((self.total - 1) // 2, self.total // 2)
        return float(
            np.mean([away[order][np.searchsorted(ends, rank, side="right")] for rank in ranks])
        )

    def to_json(self) -> dict[str, object]:
        """Lowest HU that occurs, and the counts from there on."""
        used = np.flatnonzero(self.counts)
        if not used.size:
            return {"first_hu": 0, "counts": []}
        return {
            "first_hu": int(used[0]) + LOWEST,
            "counts": self.counts[used[0] : used[-1] + 1].tolist(),
        }

    @classmethod
    def from_json(cls, data: dict) -> "HuHistogram":
        histogram = cls()
        start = int(data["first_hu"]) - LOWEST
        histogram.counts[start : start + len(data["counts"])] = data["counts"]
        return histogram

    def _used(self) -> tuple[np.ndarray, np.ndarray]:
        used = np.flatnonzero(self.counts)
        return used.astype(np.float64) + LOWEST, self.counts[used]


def pool_histograms(histograms: Iterable[HuHistogram]) -> HuHistogram:
    total = HuHistogram()
    for histogram in histograms:
        total = total + histogram
    return total


def clip_range_hu(foreground: HuHistogram, cleaning: CleaningConfig) -> tuple[float, float]:
    """(lower, upper) by the chosen rule: percentiles of the foreground (nnU-Net), a window, or robust z-scores."""
    if cleaning.outliers == "window":
        return cleaning.window_hu
    if not foreground.total:
        raise UserError(
            f"convert.cleaning.outliers={cleaning.outliers} needs labelled voxels; there are none, so use window"
        )
    if cleaning.outliers == "percentile":
        lower, upper = (foreground.quantile(percent) for percent in cleaning.percentiles)
    else:
        middle = foreground.quantile(50)
        reach = cleaning.robust_z * MAD_TO_SIGMA * foreground.median_deviation()
        lower, upper = middle - reach, middle + reach
    return lower, max(upper, lower + 1.0)


def choose_intensity(foreground: HuHistogram, cleaning: CleaningConfig) -> IntensityConfig:
    """The data set's clip and affine. Without any labelled voxel (and outliers=window): as if values were uniform."""
    lower, upper = clip_range_hu(foreground, cleaning)
    if not cleaning.standardise:
        return IntensityConfig(lower_hu=lower, upper_hu=upper, mean=0.0, std=1.0)
    if not foreground.total:
        return IntensityConfig(lower_hu=lower, upper_hu=upper, mean=0.5, std=math.sqrt(1 / 12))
    mean_hu, std_hu = foreground.moments(lower, upper)
    width = upper - lower
    return IntensityConfig(
        lower_hu=lower,
        upper_hu=upper,
        mean=(mean_hu - lower) / width,
        std=max(std_hu / width, 1e-3),
    )


def intensity_fingerprint(foreground: HuHistogram) -> dict[str, float | int]:
    """What nnU-Net's fingerprint holds, of all foreground voxels instead of a sample."""
    if not foreground.total:
        return {"voxels": 0}
    mean, std = foreground.moments()
    percentiles = {
        f"percentile_{name}_hu": foreground.quantile(p)
        for name, p in (("00_5", 0.5), ("99_5", 99.5))
    }
    return {
        "voxels": foreground.total,
        "mean_hu": mean,
        "std_hu": std,
        "median_hu": foreground.quantile(50),
        **percentiles,
    }
