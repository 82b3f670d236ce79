"""Where the windows of a scan lie and how their overlapping answers are weighted.

Windows form a product grid: every start along z meets every start along y and x. So the sum of all weights that fall on
a voxel is a product of three one-dimensional sums, and no array of weights as large as the scan is ever needed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from scipy.ndimage import gaussian_filter1d

from liverseg_dist.volume import Index3

SIGMA_SHARE = 1 / 8
"""Standard deviation of the gaussian weights as a share of the window (nnU-Net's `compute_gaussian`)."""

WindowShares = Mapping[int, np.ndarray]
"""By the start of a window along one axis."""
WindowWeights = Literal["gaussian", "constant"]


def compute_window_starts(length: int, window: int, overlap: float) -> tuple[int, ...]:
    """First voxels of the windows along one axis: the fewest, evenly spread, that overlap by at least `overlap`.

    The same places as nnU-Net's `compute_steps_for_sliding_window`. A window longer than the axis starts at 0.
    """
    room = length - window
    if room <= 0:
        return (0,)
    gaps = math.ceil(room / max(1.0, window * (1 - overlap)) - 1e-9)
    return tuple(round(room * i / gaps) for i in range(gaps + 1))


def compute_window_weights(window: int, kind: WindowWeights) -> np.ndarray:
    """Weights along one axis of a window, float32, largest 1. A gaussian filter's answer to one lit voxel is separable,
    so the product over three axes is nnU-Net's importance map up to its scale."""
    if kind == "constant":
        return np.ones(window, dtype=np.float32)
    lit = np.zeros(window)
    lit[window // 2] = 1.0
    weights = gaussian_filter1d(lit, window * SIGMA_SHARE, mode="constant")
    return (np.maximum(weights, weights[weights > 0].min()) / weights.max()).astype(np.float32)


@dataclass(frozen=True)
class WindowGrid:
    """The windows of a scan of `shape`, in the order they are computed: z first, then y, then x.

    Starts are relative to the padded scan: where the scan is smaller than the window it lies in the window's middle,
    `margin` voxels from its start.
    """

    shape: Index3
    window: Index3
    margin: Index3
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    weights: tuple[np.ndarray, np.ndarray, np.ndarray]
    """Per axis, over one window."""

    @classmethod
    def over(
        cls, shape: Index3, window: Index3, overlap: float, kind: WindowWeights
    ) -> "WindowGrid":
        z, y, x = (compute_window_starts(n, w, overlap) for n, w in zip(shape, window, strict=True))
        margin_z, margin_y, margin_x = (
            max(0, w - n) // 2 for n, w in zip(shape, window, strict=True)
        )
        weights_z, weights_y, weights_x = (compute_window_weights(w, kind) for w in window)
        return cls(
            shape,
            window,
            (margin_z, margin_y, margin_x),
            (z, y, x),
            (weights_z, weights_y, weights_x),
        )

    @property
    def padded(self) -> Index3:
        """Shape of the scan, padded to at least one window."""
        z, y, x = (max(n, w) for n, w in zip(self.shape, self.window, strict=True))
        return z, y, x

    @property
    def in_plane(self) -> list[tuple[int, int]]:
        """Starts (y, x) of the windows of one row, in order."""
        return list(product(self.starts[1], self.starts[2]))

    def __len__(self) -> int:
        return math.prod(len(starts) for starts in self.starts)

    def shares(self) -> tuple[WindowShares, WindowShares, WindowShares]:
        """Per axis and start the weights of that window over the sum of all weights there, float32.

        Their product over the axes is a window's part in the mean of all windows there: nothing is left to divide.
        """
        z, y, x = map(_shares, self.starts, self.weights, self.padded)
        return z, y, x


def _shares(starts: Sequence[int], weights: np.ndarray, length: int) -> WindowShares:
    total = np.zeros(length, dtype=np.float64)
    for start in starts:
        total[start : start + len(weights)] += weights
    return {
        start: (weights / total[start : start + len(weights)]).astype(np.float32)
        for start in starts
    }
