"""Each cleaning step against a reference (numpy, scipy, scikit-image) or a synthetic scan."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage, stats
from skimage.filters import gaussian as skimage_gaussian
from skimage.metrics import peak_signal_noise_ratio
from skimage.restoration import denoise_tv_chambolle

from liverseg_dist.config import CleaningConfig
from liverseg_dist.data.preprocessing.body_mask import bounding_box, fill_outside, find_body
from liverseg_dist.data.preprocessing.denoise import (
    bilateral_filter,
    estimate_noise,
    gaussian_filter,
    median_filter,
    minimise_total_variation,
    reduce_noise,
)
from liverseg_dist.data.preprocessing.intensity_statistics import (
    HuHistogram,
    choose_intensity,
    clip_range_hu,
    intensity_fingerprint,
    pool_histograms,
)
from liverseg_dist.data.preprocessing.invalid_voxels import (
    fill_invalid_voxels,
    find_blank_slices,
    invalid_fraction,
)
from liverseg_dist.errors import UserError
from liverseg_dist.volume import Grid, Volume

RNG = np.random.default_rng(0)


def tissue(shape: tuple[int, int, int] = (6, 40, 48), noise_hu: float = 20) -> np.ndarray:
    steps = np.where(np.arange(shape[2]) < shape[2] // 2, 40.0, 130.0)
    return np.rint(steps + np.random.default_rng(1).normal(0, noise_hu, shape)).astype(np.int16)


# --- invalid voxels ----------------------------------------------------------------------------------------------------


def test_a_valid_scan_is_returned_unchanged() -> None:
    voxels = tissue()
    filled, invalid = fill_invalid_voxels(voxels)
    assert filled is voxels
    assert invalid.to_json() == {
        "nonfinite_voxels": 0,
        "padding_voxels": 0,
        "saturated_voxels": 0,
        "blank_slices": [],
    }


def test_nan_infinity_padding_and_saturation_become_air_and_are_counted() -> None:
    voxels = tissue().astype(np.float32)
    voxels[0, 0, :3] = np.nan, np.inf, -np.inf
    voxels[0, 1, :2] = -3024, -2000
    voxels[0, 2, 0] = 60_000
    before = voxels.copy()
    filled, invalid = fill_invalid_voxels(voxels)
    assert filled.dtype == np.int16
    assert (invalid.nonfinite_voxels, invalid.padding_voxels, invalid.saturated_voxels) == (3, 2, 1)
    assert (filled[0, 0, :3] == -1024).all()
    assert (filled[0, 1, :2] == -1024).all()
    assert filled[0, 2, 0] == 32767
    reference = np.clip(np.nan_to_num(voxels, nan=-1024, posinf=-1024, neginf=-1024), -1024, 32767)
    np.testing.assert_array_equal(filled, reference)
    np.testing.assert_array_equal(voxels, before)  # pure


@given(hnp.arrays(np.float32, (2, 3, 4), elements=st.floats(width=32)))
def test_any_floats_become_valid_int16_hu(voxels: np.ndarray) -> None:
    filled, invalid = fill_invalid_voxels(voxels)
    assert filled.dtype == np.int16
    assert filled.min() >= -1024
    assert invalid.nonfinite_voxels == np.count_nonzero(~np.isfinite(voxels))
    if not invalid.blank_slices:
        fine = np.isfinite(voxels) & (voxels >= -1024) & (voxels <= 32767)
        np.testing.assert_array_equal(filled[fine], np.rint(voxels[fine]))


def test_blank_slices_between_slices_are_interpolated_as_numpy_does() -> None:
    voxels = tissue((9, 5, 5))
    voxels[[0, 3, 4, 6, 8]] = -1024  # 0 and 8 are at the ends: no neighbours to interpolate from
    filled, invalid = fill_invalid_voxels(voxels)
    assert invalid.blank_slices == (3, 4, 6)
    content = [1, 2, 5, 7]
    for y, x in np.ndindex(5, 5):
        reference = np.interp([3, 4, 6], content, voxels[content, y, x])
        np.testing.assert_allclose(filled[[3, 4, 6], y, x], reference, atol=0.51)
    np.testing.assert_array_equal(filled[[0, 1, 2, 5, 7, 8]], voxels[[0, 1, 2, 5, 7, 8]])
    assert invalid_fraction(invalid, voxels.shape) == pytest.approx(3 / 9)


def test_an_empty_scan_has_no_blank_slices_to_fill() -> None:
    assert find_blank_slices(np.zeros((4, 3, 3), np.int16)) == ()


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [1, 2])
def test_median_equals_numpys(radius: int) -> None:
    image = tissue()[0]
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(image, radius, mode="edge"), (2 * radius + 1,) * 2
    )
    np.testing.assert_array_equal(median_filter(image, radius), np.median(windows, axis=(2, 3)))


@pytest.mark.parametrize("sigma", [0.7, 1.5])
def test_gaussian_equals_skimage(sigma: float) -> None:
    image = tissue()[0]
    reference = skimage_gaussian(
        image.astype(np.float64), sigma, mode="nearest", preserve_range=True
    )
    np.testing.assert_allclose(gaussian_filter(image, sigma), reference, atol=1e-3)


@pytest.mark.parametrize("sigma", [0.8, 1.5])
def test_bilateral_equals_its_formula_and_in_the_limit_scipys_gaussian(sigma: float) -> None:
    """scikit-image 0.26 is no reference: its spatial weights belong to a window one voxel wider."""
    image, radius = tissue()[0], math.ceil(2 * sigma)
    place = np.hypot(*np.mgrid[-radius : radius + 1, -radius : radius + 1]).ravel()

    def formula(window: np.ndarray) -> float:
        weights = stats.norm.pdf(window - window[window.size // 2], scale=30) * stats.norm.pdf(
            place, scale=sigma
        )
        return np.average(window, weights=weights)

    reference = ndimage.generic_filter(
        image.astype(np.float64), formula, size=2 * radius + 1, mode="nearest"
    )
    np.testing.assert_allclose(bilateral_filter(image, sigma, 30.0), reference, atol=1e-3)
    blind = ndimage.gaussian_filter(image.astype(np.float64), sigma, radius=radius, mode="nearest")
    np.testing.assert_allclose(bilateral_filter(image, sigma, 1e6), blind, atol=1e-3)
    np.testing.assert_array_equal(bilateral_filter(image, sigma, 0.0), image)


@pytest.mark.parametrize("weight", [5.0, 20.0])
def test_total_variation_equals_skimage(weight: float) -> None:
    image = tissue()[0]
    reference = denoise_tv_chambolle(
        image.astype(np.float64), weight=weight, eps=1e-9, max_num_iter=2000
    )
    denoised = minimise_total_variation(image, weight, tolerance=1e-9, iterations=2000)
    np.testing.assert_allclose(denoised, reference, atol=0.3)
    assert (
        np.sqrt(np.mean((minimise_total_variation(image, weight) - reference) ** 2)) < 2
    )  # HU, at the tolerance in use


@pytest.mark.parametrize("sigma_hu", [5.0, 25.0])
def test_the_noise_of_a_scan_is_estimated(sigma_hu: float) -> None:
    voxels = tissue((5, 101, 103), sigma_hu)
    voxels[:, :30] = -1000  # air does not count
    assert estimate_noise(voxels) == pytest.approx(sigma_hu, rel=0.06)
    assert estimate_noise(np.full((2, 8, 8), -1000, np.int16)) == 0


@pytest.mark.parametrize("method", ["median", "gaussian", "bilateral", "tv"])
def test_noise_decreases_and_edges_remain(method: str) -> None:
    truth, noisy = tissue(noise_hu=0), tissue(noise_hu=20)
    before = noisy.copy()
    cleaned, provenance = reduce_noise(noisy, CleaningConfig(noise=method))  # type: ignore[arg-type]
    assert cleaned.dtype == np.int16
    assert provenance["method"] == method
    gain = peak_signal_noise_ratio(truth, cleaned, data_range=200) - peak_signal_noise_ratio(
        truth, noisy, data_range=200
    )
    assert gain > 5  # dB
    np.testing.assert_array_equal(noisy, before)


def test_method_none_changes_nothing() -> None:
    voxels = tissue()
    assert reduce_noise(voxels, CleaningConfig())[0] is voxels


# --- outliers and normalisation ---------------------------------------------------------------------------------------

hu_arrays = hnp.arrays(np.int16, st.integers(1, 60), elements=st.integers(-32768, 32767))


@given(hu_arrays, st.floats(0, 100))
def test_quantiles_equal_numpys(values: np.ndarray, percent: float) -> None:
    reference = np.percentile(values.astype(np.float64), percent)
    assert HuHistogram.from_voxels(values).quantile(percent) == pytest.approx(
        reference, rel=1e-9, abs=1e-9
    )


@given(hu_arrays, st.integers(-200, 0), st.integers(1, 300))
def test_moments_equal_numpys(values: np.ndarray, lower: int, upper: int) -> None:
    clipped = np.clip(values.astype(np.float64), lower, upper)
    mean, std = HuHistogram.from_voxels(values).moments(lower, upper)
    assert mean == pytest.approx(clipped.mean(), abs=1e-9)
    assert std == pytest.approx(clipped.std(), abs=1e-6)


@given(hu_arrays)
def test_median_deviation_equals_scipys(values: np.ndarray) -> None:
    reference = stats.median_abs_deviation(values.astype(np.float64))
    assert HuHistogram.from_voxels(values).median_deviation() == pytest.approx(reference)


@given(st.lists(hu_arrays, min_size=1, max_size=5), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_pooled_statistics_do_not_depend_on_the_order(
    parts: list[np.ndarray], random: "st.randoms"
) -> None:  # type: ignore[valid-type]
    cleaning = CleaningConfig()
    total = HuHistogram.from_voxels(np.concatenate(parts))
    shuffled = parts.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    pooled = pool_histograms(HuHistogram.from_voxels(part) for part in shuffled)
    assert pooled == total
    assert choose_intensity(pooled, cleaning) == choose_intensity(total, cleaning)
    assert HuHistogram.from_json(pooled.to_json()) == pooled


def test_percentile_clip_and_affine_equal_nnunets_ct_normalisation() -> None:
    """nnU-Net clips to percentiles of the foreground, then (v - mean) / std; here via [0, 1]."""
    liver = RNG.normal(110, 25, 50_000).round().astype(np.int16)
    intensity = choose_intensity(HuHistogram.from_voxels(liver), CleaningConfig())
    lower, upper = np.percentile(liver, (0.5, 99.5))
    assert (intensity.lower_hu, intensity.upper_hu) == (pytest.approx(lower), pytest.approx(upper))
    scan = RNG.integers(-1024, 2000, 1000)
    unit = (np.clip(scan, intensity.lower_hu, intensity.upper_hu) - intensity.lower_hu) / (
        intensity.upper_hu - intensity.lower_hu
    )
    assert unit.min() == 0
    assert unit.max() == 1
    clipped = np.clip(liver, lower, upper)
    reference = (np.clip(scan, lower, upper) - clipped.mean()) / clipped.std()
    np.testing.assert_allclose(
        (unit - intensity.mean) / intensity.std, reference, rtol=1e-9, atol=1e-9
    )


def test_without_standardisation_the_range_is_0_to_1() -> None:
    liver = HuHistogram.from_voxels(RNG.normal(110, 25, 5000).round().astype(np.int16))
    intensity = choose_intensity(liver, CleaningConfig(standardise=False))
    assert (intensity.mean, intensity.std) == (0, 1)
    assert (intensity.lower_hu, intensity.upper_hu) == clip_range_hu(liver, CleaningConfig())


def test_a_fixed_window_and_robust_z() -> None:
    liver = RNG.normal(100, 20, 20_000).round().astype(np.int16)
    liver[:50] = 3000  # a clip, a stent
    histogram = HuHistogram.from_voxels(liver)
    assert clip_range_hu(histogram, CleaningConfig(outliers="window")) == (-160, 240)
    lower, upper = clip_range_hu(histogram, CleaningConfig(outliers="robust_z", robust_z=3))
    deviation = stats.median_abs_deviation(liver, scale="normal")
    assert lower == pytest.approx(np.median(liver) - 3 * deviation)
    assert upper == pytest.approx(np.median(liver) + 3 * deviation)


def test_without_foreground_only_a_window_works() -> None:
    with pytest.raises(UserError, match="window"):
        choose_intensity(HuHistogram(), CleaningConfig())
    intensity = choose_intensity(HuHistogram(), CleaningConfig(outliers="window"))
    assert (intensity.lower_hu, intensity.upper_hu, intensity.mean) == (-160, 240, 0.5)
    assert intensity_fingerprint(HuHistogram()) == {"voxels": 0}


def test_a_constant_foreground_has_a_valid_normalisation() -> None:
    intensity = choose_intensity(
        HuHistogram.from_voxels(np.full(9, 50, np.int16)), CleaningConfig()
    )
    assert intensity.upper_hu > intensity.lower_hu
    assert intensity.std > 0


def test_the_fingerprint_uses_all_voxels() -> None:
    liver = RNG.normal(110, 25, 5000).round().astype(np.int16)
    fingerprint = intensity_fingerprint(HuHistogram.from_voxels(liver))
    assert fingerprint["voxels"] == 5000
    assert fingerprint["mean_hu"] == pytest.approx(liver.mean())
    assert fingerprint["std_hu"] == pytest.approx(liver.std())
    assert fingerprint["percentile_99_5_hu"] == pytest.approx(np.percentile(liver, 99.5))
    assert math.isfinite(fingerprint["median_hu"])


@pytest.mark.parametrize(
    "bad", [{"percentiles": (99.5, 0.5)}, {"percentiles": (-1, 50)}, {"window_hu": (240, -160)}]
)
def test_invalid_clip_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=r"ascending|window_hu"):
        CleaningConfig(**bad)


# --- body -------------------------------------------------------------------------------------------------------------


def patient_on_a_table(
    shape: tuple[int, int, int] = (8, 160, 200), mm: float = 1.6
) -> tuple[Volume, np.ndarray]:
    """An ellipse with lungs and bowel gas, a sheet that touches it, a table below; and the truth."""
    y, x = np.mgrid[: shape[1], : shape[2]]
    truth = ((y - 70) / 50) ** 2 + ((x - 100) / 75) ** 2 <= 1
    voxels = np.full(shape, -1000, np.int16)
    voxels[:, truth] = 40
    voxels[2:5, 60:75, 80:110] = -950  # gas
    voxels[:, 119:121, 60:140] = 60  # the sheet, touching the skin
    voxels[:, 130:137, 20:180] = -100  # the table
    voxels[:, 121:130, 98:100] = 200  # a strut that connects the two
    return Volume(voxels, Grid(shape, np.diag([mm, mm, 5.0, 1]))), np.broadcast_to(truth, shape)


def test_the_body_is_found_without_its_table() -> None:
    volume, truth = patient_on_a_table()
    mask = find_body(volume)
    dice = 2 * (mask & truth).sum() / (mask.sum() + truth.sum())
    assert dice > 0.95  # it is a few mm larger on purpose
    assert mask[truth].mean() > 0.995
    assert not mask[:, 130:].any()
    assert mask[3, 67, 95]  # gas is part of the body
    pieces, count = ndimage.label(mask)
    assert count == 1, pieces.shape


def test_the_crop_is_the_body_plus_margin() -> None:
    volume, truth = patient_on_a_table()
    box = bounding_box(truth, volume.spacing_mm, margin_mm=8)
    assert box.y == (20 - 5, 121 + 5)
    assert box.x == (25 - 5, 176 + 5)
    assert bounding_box(truth, volume.spacing_mm, margin_mm=1000).y == (0, 160)
    assert bounding_box(np.zeros_like(truth), volume.spacing_mm, 5).x == (0, 200)


def test_voxels_outside_the_body_become_air() -> None:
    volume, truth = patient_on_a_table()
    filled = fill_outside(volume.voxels, truth)
    assert (filled[~truth] == -1024).all()
    np.testing.assert_array_equal(filled[truth], volume.voxels[truth])


def test_a_scan_of_air_has_no_body() -> None:
    assert not find_body(
        Volume(np.full((3, 20, 20), -1000, np.int16), Grid((3, 20, 20), np.eye(4)))
    ).any()
