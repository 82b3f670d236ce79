"""Replaces voxels without a measurement: NaN and infinity, padding below air, blank slices."""

from dataclasses import asdict, dataclass

import numpy as np

from liverseg_dist.volume import Index3

AIR_HU = -1024
"""The lowest HU of a CT; lower values (-2000, -3024) mark voxels outside the scanner's circle."""
INT16 = np.iinfo(np.int16)


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


def fill_invalid_voxels(voxels_zyx: np.ndarray) -> tuple[np.ndarray, InvalidVoxels]:
    """Convert a scan to whole HU and replace its invalid voxels.

    NaN, infinity and padding become air. A blank slice becomes the linear interpolation of the
    nearest slices with content; blank slices at the ends stay.

    Returns:
        Int16 HU (the input itself if nothing changes), and the number of replaced voxels.
    """
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
    content = np.setdiff1d(np.arange(len(voxels)), blank)
    for z in blank:
        below, above = content[content < z][-1], content[content > z][0]
        share = (z - below) / (above - below)
        lower, upper = voxels[below].astype(np.float32), voxels[above].astype(np.float32)
        voxels[z] = np.rint((1 - share) * lower + share * upper)
    return voxels
