"""Voxels that hold no measurement: NaN and infinity, padding below air, slices without content."""

from dataclasses import asdict, dataclass

import numpy as np

AIR_HU = -1024
"""The lowest HU a CT measures; -2000, -3024 and the like mark what lies outside the scanner's circle."""
INT16 = np.iinfo(np.int16)


@dataclass(frozen=True)
class InvalidVoxels:
    """How much of a scan had to be made up."""

    nonfinite_voxels: int
    padding_voxels: int
    """Below air: set to air."""
    saturated_voxels: int
    """Above what int16 holds: set to its limit."""
    blank_slices: tuple[int, ...]
    """Slices (z) of one single value between slices with content: interpolated."""

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "blank_slices": list(self.blank_slices)}


def fill_invalid_voxels(voxels_zyx: np.ndarray) -> tuple[np.ndarray, InvalidVoxels]:
    """The scan in whole HU (int16) without broken voxels, and the counts. Returns the input itself if nothing is to do.

    NaN, infinity and padding become air. A blank slice becomes the linear interpolation of its nearest neighbours with
    content; blank slices at the ends stay.
    """
    voxels, nonfinite, saturated = _whole(voxels_zyx)
    padding = 0
    if voxels.min() < AIR_HU:
        padding = int(np.count_nonzero(voxels < AIR_HU))
        voxels = np.maximum(voxels, np.int16(AIR_HU))
    blank = blank_slices(voxels)
    if blank:
        voxels = _interpolated(voxels, blank)
    return voxels, InvalidVoxels(nonfinite, padding, saturated, blank)


def blank_slices(voxels_zyx: np.ndarray) -> tuple[int, ...]:
    """Slices (z) of one value that lie between slices with content."""
    content = np.flatnonzero(voxels_zyx.min(axis=(1, 2)) < voxels_zyx.max(axis=(1, 2)))
    if not content.size:
        return ()
    between = np.arange(content[0], content[-1] + 1)
    return tuple(int(z) for z in np.setdiff1d(between, content))


def invalid_fraction(broken: InvalidVoxels, shape_zyx: tuple[int, int, int]) -> float:
    """Share of the scan that was made up; padding does not count (it lies outside the scanner's circle)."""
    total = int(np.prod(shape_zyx))
    return (
        broken.nonfinite_voxels + len(broken.blank_slices) * shape_zyx[1] * shape_zyx[2]
    ) / total


def _whole(voxels: np.ndarray) -> tuple[np.ndarray, int, int]:
    """(int16 voxels, how many were not finite, how many too large)."""
    if voxels.dtype == np.int16:
        return voxels, 0, 0
    out = np.empty(voxels.shape, dtype=np.int16)
    nonfinite = saturated = 0
    for into, values in zip(out, voxels, strict=True):
        fine = np.isfinite(values)
        nonfinite += values.size - int(np.count_nonzero(fine))
        known = np.where(fine, values, AIR_HU)
        saturated += int(np.count_nonzero(known > INT16.max))
        into[:] = np.clip(np.rint(known), INT16.min, INT16.max)
    return out, nonfinite, saturated


def _interpolated(voxels: np.ndarray, blank: tuple[int, ...]) -> np.ndarray:
    voxels = voxels.copy()
    content = np.setdiff1d(np.arange(len(voxels)), blank)
    for z in blank:
        below, above = content[content < z][-1], content[content > z][0]
        share = (z - below) / (above - below)
        voxels[z] = np.rint(
            (1 - share) * voxels[below].astype(np.float32)
            + share * voxels[above].astype(np.float32)
        )
    return voxels
