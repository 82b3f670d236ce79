"""Values of scans in arbitrary units: their scale in int16, and the threshold of the body."""

import numpy as np
import pytest
from skimage.filters import threshold_otsu

from liverseg_dist.config.channels import ChannelConfig
from liverseg_dist.data.preprocessing.body_mask import TISSUE_HU, find_tissue_threshold
from liverseg_dist.data.preprocessing.invalid_voxels import (
    LARGEST_STORED,
    Scale,
    choose_scale,
    store_voxels,
)
from liverseg_dist.volume import Grid, Volume

MR = ChannelConfig(name="T2", modality="MR", intensity="zscore")
SHAPE = (6, 20, 24)


def make_scan(low: float, high: float, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.uniform(low, high, SHAPE).astype(np.float32)


def restore(stored: np.ndarray, scale: Scale) -> np.ndarray:
    return stored.astype(np.float64) * scale.slope + scale.intercept


@pytest.mark.parametrize(
    ("low", "high"),
    [
        pytest.param(0, 1, id="unit range"),
        pytest.param(0, 1e-6, id="tiny values"),
        pytest.param(-5, 8, id="both signs"),
        pytest.param(0, 4e6, id="beyond int16"),
        pytest.param(1000, 1010, id="a small range far from 0"),
    ],
)
def test_stored_values_are_exact_to_half_a_step(low: float, high: float) -> None:
    scan = make_scan(low, high)
    stored, invalid, scale = store_voxels(scan, MR)
    assert stored.dtype == np.int16
    assert np.abs(stored.astype(int)).max() <= LARGEST_STORED
    assert invalid.nonfinite_voxels == invalid.saturated_voxels == 0
    error = np.abs(restore(stored, scale) - scan)
    # Half a step, and the rounding of float32 input.
    assert error.max() <= scale.slope * 0.501 + abs(high) * 1e-7
    # The whole range of int16 is used: at least 14 of its 16 bits.
    assert scale.slope <= 2 * max(abs(low), abs(high), high - low) / 2**14


def test_whole_numbers_are_stored_as_they_are() -> None:
    scan = np.round(make_scan(0, 3000))
    stored, _, scale = store_voxels(scan, MR)
    assert scale.is_identity
    assert np.array_equal(stored, scan)


def test_int16_is_not_copied() -> None:
    scan = np.random.default_rng(1).integers(0, 1000, SHAPE).astype(np.int16)
    stored, _, scale = store_voxels(scan, MR)
    assert stored is scan
    assert scale.is_identity


def test_a_spike_does_not_cost_the_precision_of_the_rest() -> None:
    scan = make_scan(0, 1)
    scan[2, 3, 4] = 1e6
    stored, invalid, scale = store_voxels(scan, MR)
    assert invalid.saturated_voxels == 1
    usual = np.delete(scan.reshape(-1), np.argmax(scan))
    restored = np.delete(restore(stored, scale).reshape(-1), np.argmax(scan))
    assert np.abs(restored - usual).max() < 1e-3


def test_values_that_are_not_finite_become_zero() -> None:
    scan = make_scan(1, 2)
    scan[0, 0, 0], scan[1, 1, 1] = np.nan, np.inf
    stored, invalid, _ = store_voxels(scan, MR)
    assert invalid.nonfinite_voxels == 2
    assert stored[0, 0, 0] == stored[1, 1, 1] == 0


def test_a_constant_scan_has_a_scale() -> None:
    scale = choose_scale(np.full(SHAPE, 0.25, np.float32))
    assert scale.slope > 0
    assert np.isfinite(scale.to_stored(0.25))


def test_a_scan_without_any_finite_value_has_the_identity() -> None:
    assert choose_scale(np.full(SHAPE, np.nan, np.float32)).is_identity


@pytest.mark.parametrize("gain", [1.0, 0.01, 300.0])
def test_the_threshold_is_otsus_on_square_roots(gain: float) -> None:
    """Against scikit-image, on a dark background and two tissues."""
    rng = np.random.default_rng(2)
    scan = np.abs(rng.normal(5, 2, (8, 64, 64)))
    scan[:, 10:50, 10:30] = rng.normal(160, 15, (8, 40, 20))
    scan[:, 10:50, 30:50] = rng.normal(400, 40, (8, 40, 20))
    volume = Volume((gain * scan).astype(np.float32), Grid(scan.shape, np.eye(4)))
    found = find_tissue_threshold(volume, MR)
    sample = volume.voxels[:, ::4, ::4]
    low, high = np.percentile(sample, (0.1, 99.9))
    roots = np.sqrt(np.clip(sample, low, high) - low)
    expected = low + threshold_otsu(roots, nbins=256) ** 2
    # Within a bin: scikit-image returns the centre of the bin, not its edge.
    assert found == pytest.approx(expected, rel=0.05, abs=0.05 * gain)
    is_tissue = volume.voxels > found
    assert is_tissue[:, 10:50, 10:50].mean() > 0.99
    assert is_tissue[:, :8].mean() < 0.05


def test_the_threshold_of_ct_is_fixed() -> None:
    volume = Volume(np.zeros(SHAPE, np.int16), Grid(SHAPE, np.eye(4)))
    assert find_tissue_threshold(volume) == TISSUE_HU
