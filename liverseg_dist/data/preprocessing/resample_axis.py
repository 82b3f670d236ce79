"""Interpolation along one axis as a small matrix.

Linear, nearest and cubic-spline interpolation are linear maps, so resampling an axis of n voxels to m places is a
product with an (m, n) matrix, and a volume is resampled by one product per axis. The matrices are banded up to 1e-7,
and only the band is multiplied: matrix products run near the processor's peak, where a spline evaluated voxel by voxel
does not. Values equal `scipy.ndimage.zoom(mode="nearest", grid_mode=True)`, hence scikit-image's `resize(mode="edge")`,
which nnU-Net uses.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

Order = int
"""Degree of the spline: 0 nearest, 1 linear, 3 cubic."""

EDGE_VOXELS = 12
"""The edge value is repeated this often before the cubic spline is fitted (as scipy does); 0.27^12 is 1e-7."""
NEGLIGIBLE = 1e-7
OUTSIDE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class SamplePositions:
    """Where the `count` output voxels lie on an input axis of `length` voxels: at `first + step * i`."""

    length: int
    count: int
    first: float
    step: float

    def coordinates(self) -> np.ndarray:
        return self.first + self.step * np.arange(self.count, dtype=np.float64)

    def inside(self) -> np.ndarray:
        """Which output voxels have their centre within the outer faces of the input."""
        places = self.coordinates()
        return (places >= -0.5 - OUTSIDE_TOLERANCE) & (
            places <= self.length - 0.5 + OUTSIDE_TOLERANCE
        )

    def mirrored(self) -> "SamplePositions":
        """The same places counted from the other end of the input."""
        return SamplePositions(self.length, self.count, self.length - 1 - self.first, -self.step)

    def part(self, low: int, high: int, start: int, stop: int) -> "SamplePositions":
        """Outputs [start, stop) as places on the input voxels [low, high)."""
        return SamplePositions(
            high - low, stop - start, self.first + self.step * start - low, self.step
        )

    def indices(self) -> np.ndarray | None:
        """The input voxel of each output voxel when every place is a voxel centre (to 1/1000), else None."""
        places = self.coordinates()
        nearest = np.rint(places)
        return nearest.astype(np.int64) if np.abs(places - nearest).max() < 1e-3 else None


@dataclass(frozen=True)
class Band:
    """Output voxels [start, stop) from input voxels [low, high)."""

    start: int
    stop: int
    low: int
    high: int
    weights: np.ndarray
    """(stop - start, high - low), float32."""


@lru_cache(maxsize=64)
def matrix_bands(
    places: SamplePositions, order: Order, antialias: bool, block: int
) -> tuple[Band, ...]:
    """The matrix of an axis, `block` rows at a time with the columns that matter."""
    matrix = interpolation_matrix(places, order, antialias).astype(np.float32)
    result = []
    for start in range(0, places.count, block):
        rows = matrix[start : start + block]
        used = np.flatnonzero(np.abs(rows).max(axis=0) > NEGLIGIBLE)
        low, high = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 0)
        weights = np.ascontiguousarray(rows[:, low:high])
        weights.setflags(write=False)
        result.append(Band(start, start + len(rows), low, high, weights))
    return tuple(result)


def interpolation_matrix(
    places: SamplePositions, order: Order, antialias: bool = False
) -> np.ndarray:
    """Float64 matrix (count, length), rows sum to 1. Beyond the input the edge value goes on."""
    if order == 3:
        matrix = _cubic(places)
    elif order == 1:
        matrix = _linear(places)
    elif order == 0:
        matrix = _nearest(places)
    else:
        raise ValueError(f"interpolation order {order}; 0, 1 or 3")
    if antialias and order > 0 and abs(places.step) > 1:
        matrix = matrix @ _smoothing(places.length, (abs(places.step) - 1) / 2)
    return matrix


def _nearest(places: SamplePositions) -> np.ndarray:
    matrix = np.zeros((places.count, places.length))
    index = np.clip(np.floor(places.coordinates() + 0.5), 0, places.length - 1).astype(int)
    matrix[np.arange(places.count), index] = 1
    return matrix


def _linear(places: SamplePositions) -> np.ndarray:
    matrix = np.zeros((places.count, places.length))
    rows = np.arange(places.count)
    place = np.clip(places.coordinates(), 0, places.length - 1)
    below = np.floor(place).astype(int)
    above = np.minimum(below + 1, places.length - 1)
    np.add.at(matrix, (rows, below), 1 - (place - below))
    np.add.at(matrix, (rows, above), place - below)
    return matrix


def _cubic(places: SamplePositions) -> np.ndarray:
    """Interpolating cubic B-spline (Unser 1999, https://doi.org/10.1109/79.799930)."""
    repeated = np.clip(np.arange(-EDGE_VOXELS, places.length + EDGE_VOXELS), 0, places.length - 1)
    coefficients = ndimage.spline_filter1d(
        np.eye(places.length)[repeated], order=3, axis=0, mode="mirror"
    )
    place = np.clip(places.coordinates(), -1, places.length) + EDGE_VOXELS
    below = np.floor(place).astype(int)
    t = (place - below)[:, None]
    kernel = (
        (1 - t) ** 3 / 6,
        (4 - 6 * t**2 + 3 * t**3) / 6,
        (1 + 3 * t + 3 * t**2 - 3 * t**3) / 6,
        t**3 / 6,
    )
    return sum(
        weight * coefficients[below + shift]
        for shift, weight in zip((-1, 0, 1, 2), kernel, strict=True)
    )


def _smoothing(length: int, sigma_voxels: float) -> np.ndarray:
    """Gaussian filter as a matrix; the edge value is repeated."""
    return ndimage.gaussian_filter1d(np.eye(length), sigma_voxels, axis=0, mode="nearest")
