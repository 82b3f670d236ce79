"""Positions of a scan's windows, and the weights with which overlapping results are averaged.

The windows form a product grid: every start along z is combined with every start along y and x. So
the sum of all weights at a voxel is a product of three one-dimensional sums, and no array of
weights of the scan's size is needed. Used by `sliding_window`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from scipy.ndimage import gaussian_filter1d

from liverseg_dist.config.registry import find_registered
from liverseg_dist.volume import Index3

SIGMA_SHARE = 1 / 8
"""Standard deviation of the Gaussian weights as a share of the window (nnU-Net's
`compute_gaussian`)."""

WindowShares = Mapping[int, np.ndarray]
"""Normalised weights along one axis, by the start of the window."""
WindowWeights = Literal["gaussian", "constant"]


def compute_window_starts(length: int, window: int, overlap: float) -> tuple[int, ...]:
    """First voxels of the windows along one axis: the fewest, evenly spaced.

    Neighbouring windows overlap by at least the share `overlap`. The positions are those of
    nnU-Net's `compute_steps_for_sliding_window`. A window longer than the axis starts at 0.
    """
    last_start = length - window
    if last_start <= 0:
        return (0,)
    # Without the small term, a rounding error could add a window.
    gaps = math.ceil(last_start / max(1.0, window * (1 - overlap)) - 1e-9)
    return tuple(round(last_start * i / gaps) for i in range(gaps + 1))


def compute_window_weights(window: int, kind: WindowWeights) -> np.ndarray:
    """Weights along one axis of a window, float32, maximum 1.

    Raises:
        UserError: unknown kind of weights.
    """
    return find_registered(WINDOW_WEIGHTS, kind, "inference.window_weights")(window)


def _compute_gaussian_weights(window: int) -> np.ndarray:
    """The impulse response of a Gaussian filter.

    It is separable, so the product over three axes is nnU-Net's importance map up to its scale.
    """
    impulse = np.zeros(window)
    impulse[window // 2] = 1.0
    weights = gaussian_filter1d(impulse, window * SIGMA_SHARE, mode="constant")
    # Far from the centre the filter gives 0; a positive minimum keeps the sum of weights above 0.
    smallest = weights[weights > 0].min()
    return (np.maximum(weights, smallest) / weights.max()).astype(np.float32)


def _compute_constant_weights(window: int) -> np.ndarray:
    return np.ones(window, dtype=np.float32)


WINDOW_WEIGHTS = {"gaussian": _compute_gaussian_weights, "constant": _compute_constant_weights}
"""By the name of `inference.window_weights`."""


@dataclass(frozen=True)
class WindowGrid:
    """The windows of a scan, in the order in which they are computed: z first, then y, then x.

    Starts are relative to the padded scan. Where the scan is smaller than the window, it is centred
    in the window.

    Attributes:
        shape: shape of the scan (z, y, x).
        window: shape of a window.
        margin: voxels of padding before the scan, per axis.
        starts: starts of the windows, per axis.
        weights: weights over one window, per axis.
    """

    shape: Index3
    window: Index3
    margin: Index3
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    weights: tuple[np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def from_shape(
        cls, shape: Index3, window: Index3, overlap: float, kind: WindowWeights
    ) -> "WindowGrid":
        """The windows of a scan of a given shape."""
        margins, starts, weights = [], [], []
        for length, window_length in zip(shape, window, strict=True):
            margins.append(max(0, window_length - length) // 2)
            starts.append(compute_window_starts(length, window_length, overlap))
            weights.append(compute_window_weights(window_length, kind))
        return cls(
            shape,
            window,
            (margins[0], margins[1], margins[2]),
            (starts[0], starts[1], starts[2]),
            (weights[0], weights[1], weights[2]),
        )

    @property
    def padded_shape(self) -> Index3:
        """Shape of the scan, padded to at least one window."""
        z, y, x = map(max, self.shape, self.window)
        return z, y, x

    @property
    def starts_yx(self) -> list[tuple[int, int]]:
        """Starts (y, x) of the windows of one row, in order."""
        return list(product(self.starts[1], self.starts[2]))

    def __len__(self) -> int:
        return math.prod(len(starts) for starts in self.starts)

    def compute_shares(self) -> tuple[WindowShares, WindowShares, WindowShares]:
        """Per axis and start: the window's weights divided by the sum of all weights, float32.

        The product over the axes is the share of a window in the mean of all windows, so the sum of
        the weighted results needs no division.
        """
        z, y, x = map(_normalise_weights, self.starts, self.weights, self.padded_shape)
        return z, y, x


def _normalise_weights(starts: Sequence[int], weights: np.ndarray, length: int) -> WindowShares:
    # float64 for the sum; only the final shares are rounded to float32.
    total = np.zeros(length, dtype=np.float64)
    for start in starts:
        total[start : start + len(weights)] += weights
    shares = {}
    for start in starts:
        part = total[start : start + len(weights)]
        shares[start] = (weights / part).astype(np.float32)
    return shares
