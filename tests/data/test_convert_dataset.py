"""The preparation of a scan, which conversion and inference share."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liverseg_dist.config import CleaningConfig, ConvertConfig
from liverseg_dist.data.io.nifti import read_nifti
from liverseg_dist.data.preprocessing.pipeline import clean_scan, interpolation_for, prepare_scan
from liverseg_dist.data.preprocessing.resample import resample_to_grid
from liverseg_dist.volume import Grid, Volume
from tests.data.geometry import ALL_ORIENTATIONS

SPACING_MM = (2.5, 1.5, 1.5)


def scan() -> Volume:
    """A warm ellipsoid in cold air with a texture, stored as LPS."""
    shape = (20, 48, 60)
    z, y, x = np.indices(shape)
    body = ((z - 9) / 14) ** 2 + ((y - 22) / 16) ** 2 + ((x - 30) / 22) ** 2 <= 1
    texture = 20 * np.sin(x / 3) + 15 * np.cos(y / 4 + z / 2)
    voxels = np.where(body, 60 + texture, -1000).round().astype(np.int16)
    return Volume(
        voxels,
        Grid(
            shape, np.array([[-1.1, 0, 0, 80], [0, -1.2, 0, 60], [0, 0, 3.0, -200], [0, 0, 0, 1]])
        ),
    )


def prepared(volume: Volume, **cleaning: object) -> Volume:
    return prepare_scan(volume, ConvertConfig(cleaning=CleaningConfig(**cleaning)), SPACING_MM)


def test_the_result_is_int16_hu_in_ras() -> None:
    result = prepared(scan())
    assert result.voxels.dtype == np.int16
    assert result.grid.orientation == "RAS"
    np.testing.assert_allclose(result.spacing_mm, SPACING_MM, rtol=0.03)
    assert result.shape == (24, 38, 44)


@pytest.mark.parametrize("orientation", ALL_ORIENTATIONS[::5])
@pytest.mark.parametrize(
    "cleaning", [{}, {"body_margin_mm": 5, "noise": "median"}, {"order": 1, "outside_body": "air"}]
)
def test_the_orientation_of_the_file_does_not_matter(orientation: str, cleaning: dict) -> None:
    one, other = prepared(scan(), **cleaning), prepared(scan().reoriented(orientation), **cleaning)
    assert one.grid.matches(other.grid, tolerance_mm=1e-6)
    assert np.abs(one.voxels.astype(int) - other.voxels).max() <= 1  # rounding of x.5


def test_prepare_scan_is_cleaning_then_resampling() -> None:
    cleaning = CleaningConfig(noise="gaussian", body_margin_mm=4)
    clean = clean_scan(scan(), cleaning).volume
    reference = resample_to_grid(
        clean, clean.grid.with_spacing(SPACING_MM), interpolation=interpolation_for(cleaning)
    )
    np.testing.assert_array_equal(
        prepared(scan(), noise="gaussian", body_margin_mm=4).voxels, reference.voxels
    )


def test_a_scan_that_needs_no_change_is_returned_unchanged() -> None:
    volume = scan().reoriented("RAS")
    result = prepare_scan(volume, ConvertConfig(), volume.spacing_mm)
    np.testing.assert_array_equal(result.voxels, volume.voxels)
    np.testing.assert_allclose(result.affine, volume.affine)


def test_invalid_voxels_do_not_spread() -> None:
    volume = scan()
    voxels = volume.voxels.astype(np.float32)
    voxels[9, 22, 30] = np.nan
    voxels[:, 0, 0] = -3024
    voxels[5] = 0  # a blank slice
    result = prepared(volume.with_voxels(voxels))
    assert result.voxels.min() >= -1024
    undamaged = prepared(volume)
    close = np.abs(result.voxels.astype(int) - undamaged.voxels) <= 60
    assert close.mean() > 0.98


def test_the_input_is_not_modified() -> None:
    volume = scan()
    voxels = volume.voxels.copy()
    volume.voxels.setflags(write=False)
    prepared(volume, body_margin_mm=3, outside_body="air", noise="tv")
    np.testing.assert_array_equal(volume.voxels, voxels)


def test_the_body_crop_has_the_right_position() -> None:
    volume = scan()
    cropped = clean_scan(volume, CleaningConfig(body_margin_mm=0))
    canonical = volume.reoriented("RAS")
    assert cropped.volume.shape[1:] < canonical.shape[1:]
    np.testing.assert_array_equal(
        resample_to_grid(canonical, cropped.volume.grid).voxels, cropped.volume.voxels
    )
    assert (cropped.volume.voxels > 0).sum() == (canonical.voxels > 0).sum()
    assert cropped.provenance["body_box_yx"]


def test_provenance_describes_every_step() -> None:
    provenance = clean_scan(scan(), CleaningConfig(noise="tv", outside_body="air")).provenance
    assert provenance["orientation"] == "LPS"
    assert provenance["noise"]["method"] == "tv"  # type: ignore[index]
    assert set(provenance) == {"orientation", "broken", "noise", "body_fraction"}


@given(st.tuples(*[st.floats(1.0, 6.0)] * 3), st.sampled_from(ALL_ORIENTATIONS))
@settings(max_examples=40)
def test_a_mask_can_be_resampled_back_to_the_scan(
    spacing_mm: tuple[float, float, float], orientation: str
) -> None:
    """A mask of the prepared scan must cover the same tissue in the scan."""
    volume = scan().reoriented(orientation)
    result = prepare_scan(
        volume, ConvertConfig(cleaning=CleaningConfig(body_margin_mm=6)), spacing_mm
    )
    drawn = result.with_voxels((result.voxels > -300).astype(np.uint8))
    back = resample_to_grid(drawn, volume.grid, "label").voxels.astype(bool)
    truth = volume.voxels > -300
    assert back.shape == volume.shape
    assert 2 * (back & truth).sum() / (back.sum() + truth.sum()) > 0.88


@pytest.mark.real_mini
def test_faults_of_real_scans_are_repaired(real_mini: Path) -> None:
    """int32, -3024 padding, 3 slices, float32: all come out as int16 HU of a CT at the spacing asked for."""
    for path in sorted(real_mini.glob("images*/liver_9*.nii.gz")):
        result = prepare_scan(read_nifti(path), ConvertConfig(), (3.0, 2.0, 2.0))
        assert result.voxels.dtype == np.int16
        assert result.grid.orientation == "RAS"
        assert -1024 <= result.voxels.min() <= -900
        assert 0 < np.percentile(result.voxels, 99) < 1500
