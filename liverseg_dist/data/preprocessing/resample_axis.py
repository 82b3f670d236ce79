"""Interpolation along one axis as a small matrix.

Nearest, linear and cubic-spline interpolation are linear maps. Resampling an axis of n voxels to m
positions is a product with an (m, n) matrix, and a volume is resampled by one product per axis. The
matrices are banded up to 1e-7, and only the band is multiplied: matrix products run near the peak
speed of the processor, a spline evaluated voxel by voxel does not.

Values equal `scipy.ndimage.zoom(mode="nearest", grid_mode=True)` and therefore scikit-image's
`resize(mode="edge")`, which nnU-Net uses.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

Order = int
"""Degree of the spline: 0 nearest, 1 linear, 3 cubic."""

EDGE_VOXELS = 12
"""The edge value is repeated this often before the cubic spline is fitted, as in scipy: 0.27^12 is
1e-7."""
NEGLIGIBLE_WEIGHT = 1e-7
OUTSIDE_TOLERANCE = 1e-3
"""Voxels; rounding must not put a voxel on the outer face outside."""
INDEX_TOLERANCE = 1e-3
"""Voxels; positions this close to a voxel centre take the voxel without interpolation."""


@dataclass(frozen=True)
class SamplePositions:
    """Positions of `count` outputs on an axis of `length` input voxels: `first + step * i`."""

    length: int
    count: int
    first: float
    step: float

    def coordinates(self) -> np.ndarray:
        """The positions in input voxels, float64 (count)."""
        return self.first + self.step * np.arange(self.count, dtype=np.float64)

    def inside(self) -> np.ndarray:
        """Boolean (count): whether a position is within the outer faces of the input."""
        coordinates = self.coordinates()
        low, high = -0.5 - OUTSIDE_TOLERANCE, self.length - 0.5 + OUTSIDE_TOLERANCE
        return (coordinates >= low) & (coordinates <= high)

    def mirrored(self) -> "SamplePositions":
        """The same positions counted from the other end of the input."""
        return SamplePositions(self.length, self.count, self.length - 1 - self.first, -self.step)

    def part(self, low: int, high: int, start: int, stop: int) -> "SamplePositions":
        """Outputs [start, stop) as positions on the input voxels [low, high)."""
        first = self.first + self.step * start - low
        return SamplePositions(high - low, stop - start, first, self.step)

    def nearest_indices(self) -> np.ndarray | None:
        """The input voxel of each output voxel if every position is a voxel centre, else None."""
        coordinates = self.coordinates()
        nearest = np.rint(coordinates)
        # One position between voxels makes the whole axis an interpolation.
        if np.abs(coordinates - nearest).max() >= INDEX_TOLERANCE:
            return None
        return nearest.astype(np.int64)


@dataclass(frozen=True)
class Band:
    """Part of an axis's matrix: output voxels [start, stop) from input voxels [low, high)."""

    start: int
    stop: int
    low: int
    high: int
    weights: np.ndarray
    """(stop - start, high - low), float32."""


@lru_cache(maxsize=64)
def matrix_bands(
    positions: SamplePositions, order: Order, antialias: bool, block: int
) -> tuple[Band, ...]:
    """The matrix of an axis in blocks of `block` rows, each without its negligible columns.

    Cached, because the scans of a data set share few grids.
    """
    matrix = interpolation_matrix(positions, order, antialias).astype(np.float32)
    bands = []
    for start in range(0, positions.count, block):
        rows = matrix[start : start + block]
        used = np.flatnonzero(np.abs(rows).max(axis=0) > NEGLIGIBLE_WEIGHT)
        low, high = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 0)
        weights = np.ascontiguousarray(rows[:, low:high])
        # The cache hands the same array to all callers.
        weights.setflags(write=False)
        bands.append(Band(start, start + len(rows), low, high, weights))
    return tuple(bands)


def interpolation_matrix(
    positions: SamplePositions, order: Order, antialias: bool = False
) -> np.ndarray:
    """The interpolation as a matrix; beyond the input the edge value is repeated.

    Args:
        positions: Where the output voxels are.
        order: Degree of the spline.
        antialias: Smooth the input first where voxels grow.

    Returns:
        Float64 (count, length); each row sums to 1.

    Raises:
        ValueError: The order is not 0, 1 or 3.
    """
    if order == 3:
        matrix = _cubic_matrix(positions)
    elif order == 1:
        matrix = _linear_matrix(positions)
    elif order == 0:
        matrix = _nearest_matrix(positions)
    else:
        raise ValueError(f"interpolation order {order}; use 0, 1 or 3")
    # Smoothing before the voxels grow: each new voxel then averages what it covers.
    if antialias and order > 0 and abs(positions.step) > 1:
        matrix = matrix @ _gaussian_matrix(positions.length, (abs(positions.step) - 1) / 2)
    return matrix


def _nearest_matrix(positions: SamplePositions) -> np.ndarray:
    matrix = np.zeros((positions.count, positions.length))
    # Half a voxel is rounded up, as scipy does.
    nearest = np.floor(positions.coordinates() + 0.5)
    columns = np.clip(nearest, 0, positions.length - 1).astype(int)
    matrix[np.arange(positions.count), columns] = 1
    return matrix


def _linear_matrix(positions: SamplePositions) -> np.ndarray:
    matrix = np.zeros((positions.count, positions.length))
    rows = np.arange(positions.count)
    coordinates = np.clip(positions.coordinates(), 0, positions.length - 1)
    below = np.floor(coordinates).astype(int)
    above = np.minimum(below + 1, positions.length - 1)
    # At the last voxel `below` and `above` are the same column, so both weights are added.
    np.add.at(matrix, (rows, below), 1 - (coordinates - below))
    np.add.at(matrix, (rows, above), coordinates - below)
    return matrix


def _cubic_matrix(positions: SamplePositions) -> np.ndarray:
    """Interpolating cubic B-spline (Unser 1999, https://doi.org/10.1109/79.799930)."""
    padded = np.arange(-EDGE_VOXELS, positions.length + EDGE_VOXELS)
    # The padded axis repeats the edge, so that the spline is not pulled to 0 there.
    repeated = np.clip(padded, 0, positions.length - 1)
    coefficients = ndimage.spline_filter1d(
        np.eye(positions.length)[repeated], order=3, axis=0, mode="mirror"
    )
    coordinates = np.clip(positions.coordinates(), -1, positions.length) + EDGE_VOXELS
    below = np.floor(coordinates).astype(int)
    t = (coordinates - below)[:, None]
    # Weights of the four coefficients around each position.
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


def _gaussian_matrix(length: int, sigma_voxels: float) -> np.ndarray:
    """Gaussian filter as a matrix; the edge value is repeated."""
    return ndimage.gaussian_filter1d(np.eye(length), sigma_voxels, axis=0, mode="nearest")
