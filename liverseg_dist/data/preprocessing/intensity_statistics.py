"""Clip range and normalisation of a data set, from an exact histogram of its liver voxels.

A `HuHistogram` counts whole HU, so pooling cases is addition: the result does not depend on the
order of cases or the number of workers. `choose_intensity` turns the pooled histogram into the
`IntensityConfig` that is recorded in the store and applied on the device: clip, map to [0, 1],
subtract the mean, divide by the standard deviation.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from liverseg_dist.config import CleaningConfig, IntensityConfig
from liverseg_dist.errors import UserError

MIN_HU, MAX_HU = -32768, 32767
HU_VALUES = MAX_HU - MIN_HU + 1
MAD_TO_SIGMA = 1.482602218505602
"""Normal distribution: standard deviation divided by median absolute deviation."""
MIN_WIDTH_HU = 1.0
"""Smallest clip range: constant tissue must not lead to a division by zero."""
MIN_STD = 1e-3
"""Smallest standard deviation after the map to [0, 1], for the same reason."""


@dataclass(frozen=True, eq=False)
class HuHistogram:
    """How often each whole HU occurs: `counts[hu - MIN_HU]`, int64."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(HU_VALUES, dtype=np.int64))

    @classmethod
    def from_voxels(cls, values_hu: np.ndarray) -> "HuHistogram":
        """Count int16 voxels of any shape.

        Raises:
            ValueError: The voxels are not int16.
        """
        # Other types would be rounded, and the histogram would no longer be exact.
        if values_hu.dtype != np.int16:
            raise ValueError(f"a histogram counts int16 HU, not {values_hu.dtype}")
        # int32: the difference does not fit into int16.
        offsets = values_hu.reshape(-1).astype(np.int32) - MIN_HU
        return cls(np.bincount(offsets, minlength=HU_VALUES))

    def __add__(self, other: "HuHistogram") -> "HuHistogram":
        return HuHistogram(self.counts + other.counts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HuHistogram) and np.array_equal(self.counts, other.counts)

    @property
    def total(self) -> int:
        """Number of voxels."""
        return int(self.counts.sum())

    def quantile(self, percent: float) -> float:
        """The same value as `numpy.percentile` (linear) of all voxels.

        Raises:
            ValueError: The histogram is empty.
        """
        if not self.total:
            raise ValueError("an empty histogram has no percentiles")
        # The position between two ranks, by numpy's definition of `linear`.
        position = percent / 100 * (self.total - 1)
        below = math.floor(position)
        low, high = self._value_at_rank(below), self._value_at_rank(math.ceil(position))
        return low + (high - low) * (position - below)

    def _value_at_rank(self, rank: int) -> int:
        """HU of the voxel at a rank (from 0) in ascending order."""
        return int(np.searchsorted(np.cumsum(self.counts), rank, side="right")) + MIN_HU

    def moments(self, lower: float = -math.inf, upper: float = math.inf) -> tuple[float, float]:
        """(mean, standard deviation) after clipping to [lower, upper].

        Sums are exact (`math.fsum`): the bits do not depend on the order of the cases.
        """
        hu, counts = self._occurring_values()
        clipped = np.clip(hu, lower, upper)
        mean = math.fsum(n * v for n, v in zip(counts, clipped, strict=True)) / self.total
        # Around the mean and not as a difference of squares, which would cancel digits.
        squares = math.fsum(n * (v - mean) ** 2 for n, v in zip(counts, clipped, strict=True))
        return mean, math.sqrt(squares / self.total)

    def median_deviation(self) -> float:
        """Median absolute deviation from the median."""
        hu, counts = self._occurring_values()
        deviations = np.abs(hu - self.quantile(50))
        # Stable, so that equal deviations keep their order and the result is the same on each
        # machine.
        order = np.argsort(deviations, kind="stable")
        ends = np.cumsum(counts[order])
        # The two middle voxels; the same voxel twice for an odd number.
        ranks = [(self.total - 1) // 2, self.total // 2]
        middle = deviations[order][np.searchsorted(ends, ranks, side="right")]
        return float(np.mean(middle))

    def to_json(self) -> dict[str, object]:
        """The lowest HU that occurs, and the counts from there to the highest."""
        # Only the part that occurs is stored: most of the 65,536 values never do.
        occurring = np.flatnonzero(self.counts)
        if not occurring.size:
            return {"first_hu": 0, "counts": []}
        first, last = int(occurring[0]), int(occurring[-1])
        return {"first_hu": first + MIN_HU, "counts": self.counts[first : last + 1].tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "HuHistogram":
        """Inverse of `to_json`."""
        histogram = cls()
        start = int(data["first_hu"]) - MIN_HU
        histogram.counts[start : start + len(data["counts"])] = data["counts"]
        return histogram

    def _occurring_values(self) -> tuple[np.ndarray, np.ndarray]:
        """(HU as float64, count) of the values that occur."""
        occurring = np.flatnonzero(self.counts)
        return occurring.astype(np.float64) + MIN_HU, self.counts[occurring]


def pool_histograms(histograms: Iterable[HuHistogram]) -> HuHistogram:
    """The histogram of all voxels together."""
    total = HuHistogram()
    for histogram in histograms:
        total = total + histogram
    return total


def _clip_to_percentiles(foreground: HuHistogram, cleaning: CleaningConfig) -> tuple[float, float]:
    """Percentiles of the liver voxels, as in nnU-Net."""
    lower, upper = cleaning.percentiles
    return foreground.quantile(lower), foreground.quantile(upper)


def _clip_to_window(foreground: HuHistogram, cleaning: CleaningConfig) -> tuple[float, float]:
    """A fixed window, which needs no labelled voxels."""
    return cleaning.window_hu


def _clip_to_robust_z(foreground: HuHistogram, cleaning: CleaningConfig) -> tuple[float, float]:
    """Median plus and minus a number of robust standard deviations."""
    median = foreground.quantile(50)
    half_width = cleaning.robust_z * MAD_TO_SIGMA * foreground.median_deviation()
    return median - half_width, median + half_width


ClipRule = Callable[[HuHistogram, CleaningConfig], tuple[float, float]]
CLIP_RULES: dict[str, ClipRule] = {
    "percentile": _clip_to_percentiles,
    "window": _clip_to_window,
    "robust_z": _clip_to_robust_z,
}
"""Rule by its name in `convert.cleaning.outliers`."""


def clip_range_hu(foreground: HuHistogram, cleaning: CleaningConfig) -> tuple[float, float]:
    """(lower, upper) HU by the rule `cleaning.outliers`.

    Raises:
        UserError: The rule is unknown, or needs labelled voxels and there are none.
    """
    if cleaning.outliers not in CLIP_RULES:
        raise UserError(
            f"convert.cleaning.outliers: unknown rule {cleaning.outliers!r}; "
            f"use one of {', '.join(CLIP_RULES)}"
        )
    # A window needs no labelled voxels, so it also works for data sets without labels.
    if cleaning.outliers == "window":
        return _clip_to_window(foreground, cleaning)
    if not foreground.total:
        raise UserError(
            f"convert.cleaning.outliers={cleaning.outliers} needs labelled voxels; "
            "there are none, so use window"
        )
    lower, upper = CLIP_RULES[cleaning.outliers](foreground, cleaning)
    # The range must not be empty, also where all labelled voxels have one value.
    return lower, max(upper, lower + MIN_WIDTH_HU)


def choose_intensity(foreground: HuHistogram, cleaning: CleaningConfig) -> IntensityConfig:
    """Clip range and affine map of a data set.

    Without labelled voxels (possible with outliers=window) mean and standard deviation are those of
    a uniform distribution.
    """
    lower, upper = clip_range_hu(foreground, cleaning)
    if not cleaning.standardise:
        return IntensityConfig(lower_hu=lower, upper_hu=upper, mean=0.0, std=1.0)
    # A uniform distribution on [0, 1] has this mean and deviation.
    if not foreground.total:
        return IntensityConfig(lower_hu=lower, upper_hu=upper, mean=0.5, std=math.sqrt(1 / 12))
    mean_hu, std_hu = foreground.moments(lower, upper)
    width = upper - lower
    return IntensityConfig(
        lower_hu=lower,
        upper_hu=upper,
        mean=(mean_hu - lower) / width,
        std=max(std_hu / width, MIN_STD),
    )


def intensity_fingerprint(foreground: HuHistogram) -> dict[str, float | int]:
    """The statistics of nnU-Net's fingerprint, over all foreground voxels instead of a sample."""
    if not foreground.total:
        return {"voxels": 0}
    mean, std = foreground.moments()
    return {
        "voxels": foreground.total,
        "mean_hu": mean,
        "std_hu": std,
        "median_hu": foreground.quantile(50),
        "percentile_00_5_hu": foreground.quantile(0.5),
        "percentile_99_5_hu": foreground.quantile(99.5),
    }
