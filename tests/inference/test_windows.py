"""Window positions and weights against nnU-Net's published rules, computed with scipy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from liverseg_dist.inference.windows import (
    WindowGrid,
    compute_window_starts,
    compute_window_weights,
)


@given(st.integers(1, 300), st.integers(1, 96), st.floats(0, 0.95))
def test_windows_cover_the_axis_and_overlap_as_asked(
    length: int, window: int, overlap: float
) -> None:
    starts = compute_window_starts(length, window, overlap)
    assert starts[0] == 0
    assert starts[-1] == max(0, length - window)
    gaps = np.diff(starts)
    assert (gaps > 0).all()
    assert (gaps <= np.ceil(max(1.0, window * (1 - overlap)) + 1e-6)).all()
    if len(starts) > 2:  # one window fewer would be too far apart
        assert (length - window) / (len(starts) - 2) > window * (1 - overlap) - 1e-6


@pytest.mark.parametrize(
    ("length", "expected"),
    [(64, (0,)), (30, (0,)), (65, (0, 1)), (96, (0, 32)), (100, (0, 18, 36)), (128, (0, 32, 64))],
)
def test_starts_are_those_of_nnunet(length: int, expected: tuple[int, ...]) -> None:
    assert compute_window_starts(length, 64, 0.5) == expected


@pytest.mark.parametrize("window", [(8, 16, 12), (5, 9, 7), (1, 4, 2)])
def test_product_of_axis_weights_is_the_filtered_point(window: tuple[int, int, int]) -> None:
    point = np.zeros(window)
    point[tuple(n // 2 for n in window)] = 1
    expected = gaussian_filter(point, [n / 8 for n in window], order=0, mode="constant", cval=0)
    z, y, x = (compute_window_weights(n, "gaussian") for n in window)
    product = z[:, None, None] * y[:, None] * x
    np.testing.assert_allclose(product, expected / expected.max(), rtol=2e-6)
    assert product.min() > 0


def test_shares_of_all_windows_sum_to_one_and_are_their_weights() -> None:
    grid = WindowGrid.from_shape((21, 40, 9), (8, 16, 12), 0.6, "gaussian")
    weights = grid.weights[0][:, None, None] * grid.weights[1][:, None] * grid.weights[2]
    shares = grid.compute_shares()
    total, summed = np.zeros((2, *grid.padded_shape))
    for z in grid.starts[0]:
        for y, x in grid.starts_yx:
            box = np.s_[z : z + 8, y : y + 16, x : x + 12]
            summed[box] += shares[0][z][:, None, None] * shares[1][y][:, None] * shares[2][x]
            total[box] += weights
    np.testing.assert_allclose(summed, 1, rtol=1e-6)
    np.testing.assert_allclose(shares[0][0][:, None, None] * shares[1][0][:, None] * shares[2][0],
                               weights / total[:8, :16, :12], rtol=1e-5)  # fmt: skip
    assert len(grid) == len(grid.starts[0]) * len(grid.starts_yx)
