"""Growth of lesions: measurement error, change, growth rate, doubling time with its interval.

Measurement error has two parts. Reproducibility: of same-day repeat CTs with computer-aided
measurement (Zhao et al. 2009, https://doi.org/10.1148/radiol.2522081593; the figures stand on
https://www.cancerimagingarchive.net/collection/rider-lung-ct/) 95 % of the changes lay from -7.3 to
+6.2 % in diameter and from -12.1 to +13.4 % in volume. These are lung tumours of 32 patients: no such
figures were found for the liver, whose lesions have less contrast, so the error there is rather
larger. Halves of these intervals over 1.96 are the standard deviation of a change, over the square
root of 2 that of one measurement. Sampling: the
surface is known to a part of a voxel (`diameters` has the figures), so small lesions and thick
slices count for more.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Z95 = 1.96
# A change has the variance of two measurements, hence the division by the square root of 2.
DIAMETER_SD = (0.073 + 0.062) / 2 / Z95 / math.sqrt(2)
VOLUME_SD = (0.121 + 0.134) / 2 / Z95 / math.sqrt(2)
"""Relative standard deviations of one measurement."""
PIXEL_SHARE, SLICE_SHARE = 0.2, 0.06
"""Standard deviation of a long axis in pixels and slices (`diameters`)."""
SURFACE_SHARE = 0.025
"""Standard deviation of the surface's mean position in slices: 6 % of the volume of small balls at
5 mm."""
DAYS_PER_YEAR = 365.25


@dataclass(frozen=True)
class Growth:
    """Exponential growth of a volume over the dates.

    Attributes:
        rate_per_day: Slope of ln(volume) over time.
        rate_interval: Its 95 % interval.
        doubling_days: ln 2 / rate; negative values are halving times. None where the rate is 0.
        doubling_interval: From the ends of the rate's interval, (shortest, longest); a None end is
            unbounded, because the interval of the rate includes 0.
        is_significant: Whether the rate's interval excludes 0.
        fits: By model, the root mean square residual of the volumes in ml and the corrected AIC
            where it exists.
        best_model: The one with the lowest AIC; None with fewer than four dates.
    """

    rate_per_day: float
    rate_interval: tuple[float, float]
    doubling_days: float | None
    doubling_interval: tuple[float | None, float | None]
    is_significant: bool
    fits: dict[str, dict[str, float | None]]
    best_model: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def diameter_sd_mm(diameter_mm: float, pixel_mm: float, slice_mm: float) -> float:
    """Standard deviation of one measured diameter."""
    return math.hypot(DIAMETER_SD * diameter_mm, PIXEL_SHARE * pixel_mm, SLICE_SHARE * slice_mm)


def volume_sd_ml(volume_ml: float, slice_mm: float) -> float:
    """Standard deviation of one measured volume; the surface is that of the ball of this volume."""
    if volume_ml <= 0:
        return 0.0
    # Area of a ball: pi^(1/3) (6 V)^(2/3); 1 ml is 1000 mm3.
    area_mm2 = math.pi ** (1 / 3) * (6000.0 * volume_ml) ** (2 / 3)
    return math.hypot(VOLUME_SD * volume_ml, area_mm2 * SURFACE_SHARE * slice_mm / 1000.0)


def exceeds_error(change: float, sd_before: float, sd_after: float) -> bool:
    """Whether a change is larger than measurement error explains (95 %)."""
    return abs(change) > Z95 * math.hypot(sd_before, sd_after)


def fit_growth(
    days: Sequence[float], volumes_ml: Sequence[float], sds_ml: Sequence[float]
) -> Growth | None:
    """Growth of a lesion that was measured at several dates; None with fewer than two volumes above
    0.

    The rate is a weighted least squares slope of ln(volume); its interval follows from the
    measurement errors and, with three dates and more, from the scatter around the line where that
    is larger.
    """
    known = [i for i, volume in enumerate(volumes_ml) if volume > 0]
    if len(known) < 2:
        return None
    # The logarithm needs volumes above 0; a lesion that is gone has no rate.
    time = np.array([float(days[i]) for i in known])
    volume = np.array([float(volumes_ml[i]) for i in known])
    sd = np.array([max(float(sds_ml[i]), 1e-9) for i in known])
    # To first order, the standard deviation of ln(V) is the relative one of V.
    rate, intercept, rate_sd = _weighted_line(time, np.log(volume), sd / volume)
    low, high = rate - Z95 * rate_sd, rate + Z95 * rate_sd
    fits = {"exponential": _judge_fit(volume, np.exp(intercept + rate * time), sd, 2)}
    slope, start, _ = _weighted_line(time, volume, sd)
    fits["linear volume"] = _judge_fit(volume, start + slope * time, sd, 2)
    diameter = np.cbrt(volume)
    # To first order again: the derivative of d^3 is 3 d^2.
    slope, start, _ = _weighted_line(time, diameter, sd / (3 * diameter**2))
    fits["linear diameter"] = _judge_fit(volume, np.maximum(start + slope * time, 0.0) ** 3, sd, 2)
    comparable = {name: fit["aicc"] for name, fit in fits.items() if fit["aicc"] is not None}
    return Growth(
        rate,
        (low, high),
        math.log(2) / rate if abs(rate) > 1e-12 else None,
        _doubling_interval(low, high),
        low > 0 or high < 0,
        fits,
        min(comparable, key=lambda name: comparable[name] or 0.0) if comparable else None,
    )


def _weighted_line(
    time: np.ndarray, value: np.ndarray, sd: np.ndarray
) -> tuple[float, float, float]:
    """(slope, intercept, standard deviation of the slope)."""
    weight = 1.0 / sd**2
    mean_time = (weight * time).sum() / weight.sum()
    spread = (weight * (time - mean_time) ** 2).sum()
    slope = float((weight * (time - mean_time) * value).sum() / spread)
    intercept = float((weight * (value - slope * time)).sum() / weight.sum())
    slope_sd = 1.0 / math.sqrt(spread)
    # Two dates have no scatter around their line: only the measurement error is known.
    if len(time) > 2:
        scatter = (weight * (value - intercept - slope * time) ** 2).sum() / (len(time) - 2)
        # Never below the measurement error: three points may lie on a line by chance.
        slope_sd *= max(1.0, math.sqrt(scatter))
    return slope, intercept, slope_sd


def _doubling_interval(low: float, high: float) -> tuple[float | None, float | None]:
    """Times that belong to the ends of the rate's interval; growth that may be none has no longest
    time."""
    if low > 0:
        return math.log(2) / high, math.log(2) / low
    if high < 0:
        return math.log(2) / low, math.log(2) / high
    return (math.log(2) / high if high > 0 else None), None


def _judge_fit(
    volume: np.ndarray, fitted: np.ndarray, sd: np.ndarray, parameters: int
) -> dict[str, float | None]:
    residual = volume - fitted
    count = len(volume)
    aicc = None
    # The small-sample correction needs two dates more than parameters.
    if count >= parameters + 2:
        correction = 2 * parameters * (parameters + 1) / (count - parameters - 1)
        aicc = float(((residual / sd) ** 2).sum() + 2 * parameters + correction)
    return {"rms_ml": float(np.sqrt((residual**2).mean())), "aicc": aicc}
