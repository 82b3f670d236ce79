"""Replaces voxels without a measurement, and brings the others into int16.

CT is whole HU: NaN, infinity and padding below air become air. Other channels have arbitrary units:
NaN and infinity become 0, and values that int16 cannot hold are scaled (`Scale`). Blank slices are
interpolated in both.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from liverseg_dist.config import CT_CHANNEL, ChannelConfig
from liverseg_dist.volume import Index3

AIR_HU = -1024
"""The lowest HU of a CT; lower values (-2000, -3024) mark voxels outside the scanner's circle."""
INT16 = np.iinfo(np.int16)
OUTSIDE_VALUE = 0
"""Stored value outside of a scan in arbitrary units."""
LARGEST_STORED = 32000
"""Largest magnitude of scaled values. Below the limit of int16: cubic splines overshoot."""
SPIKE_PERCENTILE, SPIKE_FACTOR = 99.9, 16.0
"""Scaled values beyond this factor times this percentile saturate: single spikes must not cost the
precision of the rest."""
MIN_RELATIVE_RANGE = 1 / 16
"""Values within a smaller part of their magnitude (1000 to 1010) are scaled from their minimum."""
SAMPLE_STRIDE = 3
MIN_RANGE = 1e-30
"""A constant scan must not lead to a slope of 0."""


@dataclass(frozen=True)
class InvalidVoxels:
    """How many voxels of a scan were replaced."""

    nonfinite_voxels: int
    """NaN and infinity: set to air."""
    padding_voxels: int
    """Below air: set to air."""
    saturated_voxels: int
    """Above the range of int16: set to its limit."""
    blank_slices: tuple[int, ...]
    """Slices (z) of one single value between slices with content: interpolated."""

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "blank_slices": list(self.blank_slices)}


@dataclass(frozen=True)
class Scale:
    """value = slope * stored + intercept."""

    slope: float = 1.0
    intercept: float = 0.0

    @property
    def is_identity(self) -> bool:
        return self == Scale()

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    def to_stored(self, value: Any) -> Any:
        """Stored values, not rounded, of a number or an array in the scan's own units."""
        return (value - self.intercept) / self.slope


def outside_value(channel: ChannelConfig) -> int:
    """Stored value of voxels outside of a scan: air for CT, else 0."""
    return AIR_HU if channel.is_ct else OUTSIDE_VALUE


def store_voxels(
    voxels_zyx: np.ndarray, channel: ChannelConfig = CT_CHANNEL
) -> tuple[np.ndarray, InvalidVoxels, Scale]:
    """Convert a scan of any channel to int16 and replace its invalid voxels.

    Args:
        voxels_zyx: HU for CT, else arbitrary units.
        channel: The channel of the scan.

    Returns:
        Int16 voxels (the input itself if nothing changes), the number of replaced voxels, and the
        scale of the stored values (CT: always that of whole HU).
    """
    if channel.is_ct:
        voxels, invalid = fill_invalid_voxels(voxels_zyx)
        return voxels, invalid, Scale()
    # The scale is chosen on the whole scan, because all slices must share it.
    scale = choose_scale(voxels_zyx)
    voxels, nonfinite, saturated = _convert_to_stored(voxels_zyx, scale)
    blank = find_blank_slices(voxels)
    if blank:
        voxels = _interpolate_slices(voxels, blank)
    return voxels, InvalidVoxels(nonfinite, 0, saturated, blank), scale


def choose_scale(voxels_zyx: np.ndarray) -> Scale:
    """The scale that brings arbitrary units into int16; identity where the values already fit."""
    if voxels_zyx.dtype == np.int16:
        return Scale()
    low, high, is_whole = math.inf, -math.inf, True
    # Slice by slice: no second copy of a large scan.
    for values in voxels_zyx:
        finite = values[np.isfinite(values)].astype(np.float64)
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            is_whole = is_whole and bool((finite == np.rint(finite)).all())
    # Whole numbers within the range are stored as they are, so that nothing is lost.
    if low > high or (is_whole and -INT16.max <= low and high <= INT16.max):
        return Scale()
    # A sample gives the usual magnitude; a percentile of all voxels would sort a large scan.
    sample = voxels_zyx[:, ::SAMPLE_STRIDE, ::SAMPLE_STRIDE]
    magnitudes = np.abs(sample[np.isfinite(sample)].astype(np.float64))
    largest = max(abs(low), abs(high))
    if magnitudes.size:
        usual = float(np.percentile(magnitudes, SPIKE_PERCENTILE))
        largest = min(largest, SPIKE_FACTOR * usual) if usual > 0 else largest
    # From their minimum on: with an intercept the small range uses all of int16.
    if high - low < MIN_RELATIVE_RANGE * largest:
        return Scale(max(high - low, MIN_RANGE) / LARGEST_STORED, low)
    return Scale(max(largest, MIN_RANGE) / LARGEST_STORED)


def _convert_to_stored(voxels: np.ndarray, scale: Scale) -> tuple[np.ndarray, int, int]:
    """(int16 voxels, how many were not finite, how many beyond the range)."""
    # The lowest int16 is the store's mark of a missing file.
    if voxels.dtype == np.int16:
        saturated = int(np.count_nonzero(voxels == INT16.min))
        return (np.maximum(voxels, -INT16.max) if saturated else voxels), 0, saturated
    limit = INT16.max if scale.is_identity else LARGEST_STORED
    out = np.empty(voxels.shape, dtype=np.int16)
    nonfinite = saturated = 0
    for target, values in zip(out, voxels, strict=True):
        is_finite = np.isfinite(values)
        nonfinite += values.size - int(np.count_nonzero(is_finite))
        stored = np.rint(scale.to_stored(np.where(is_finite, values, 0).astype(np.float64)))
        stored[~is_finite] = OUTSIDE_VALUE
        saturated += int(np.count_nonzero(np.abs(stored) > limit))
        target[:] = np.clip(stored, -limit, limit)
    return out, nonfinite, saturated


def fill_invalid_voxels(voxels_zyx: np.ndarray) -> tuple[np.ndarray, InvalidVoxels]:
    """Convert a scan to whole HU and replace its invalid voxels.

    NaN, infinity and padding become air. A blank slice becomes the linear interpolation of the
    nearest slices with content; blank slices at the ends stay.

    Returns:
        Int16 HU (the input itself if nothing changes), and the number of replaced voxels.
    """
    # First the conversion: NaN would make every later comparison false.
    voxels, nonfinite, saturated = _convert_to_int16(voxels_zyx)
    padding = 0
    # The test avoids a copy of scans without padding.
    if voxels.min() < AIR_HU:
        padding = int(np.count_nonzero(voxels < AIR_HU))
        voxels = np.maximum(voxels, np.int16(AIR_HU))
    blank = find_blank_slices(voxels)
    if blank:
        voxels = _interpolate_slices(voxels, blank)
    return voxels, InvalidVoxels(nonfinite, padding, saturated, blank)


def find_blank_slices(voxels_zyx: np.ndarray) -> tuple[int, ...]:
    """Slices (z) of one value that are between slices with content."""
    # A slice of one value between others is a lost slice; at the ends it is empty space.
    has_content = voxels_zyx.min(axis=(1, 2)) < voxels_zyx.max(axis=(1, 2))
    content = np.flatnonzero(has_content)
    if not content.size:
        return ()
    between = np.arange(content[0], content[-1] + 1)
    return tuple(int(z) for z in np.setdiff1d(between, content))


def invalid_fraction(invalid: InvalidVoxels, shape_zyx: Index3) -> float:
    """Share of the scan that was replaced, without padding outside the scanner's circle."""
    interpolated = len(invalid.blank_slices) * shape_zyx[1] * shape_zyx[2]
    return (invalid.nonfinite_voxels + interpolated) / int(np.prod(shape_zyx))


def _convert_to_int16(voxels: np.ndarray) -> tuple[np.ndarray, int, int]:
    """(int16 voxels, how many were not finite, how many too large)."""
    if voxels.dtype == np.int16:
        return voxels, 0, 0
    out = np.empty(voxels.shape, dtype=np.int16)
    nonfinite = saturated = 0
    # Slice by slice: a float64 scan of 1 GB would otherwise need several copies.
    for target, values in zip(out, voxels, strict=True):
        is_finite = np.isfinite(values)
        nonfinite += values.size - int(np.count_nonzero(is_finite))
        finite = np.where(is_finite, values, AIR_HU)
        saturated += int(np.count_nonzero(finite > INT16.max))
        target[:] = np.clip(np.rint(finite), INT16.min, INT16.max)
    return out, nonfinite, saturated


def _interpolate_slices(voxels: np.ndarray, blank: tuple[int, ...]) -> np.ndarray:
    """A copy in which the blank slices are interpolated from the nearest others."""
    voxels = voxels.copy()
    # Only slices with content: two blank ones beside each other are both interpolated.
    content = np.setdiff1d(np.arange(len(voxels)), blank)
    for z in blank:
        below, above = content[content < z][-1], content[content > z][0]
        share = (z - below) / (above - below)
        lower, upper = voxels[below].astype(np.float32), voxels[above].astype(np.float32)
        voxels[z] = np.rint((1 - share) * lower + share * upper)
    return voxels
