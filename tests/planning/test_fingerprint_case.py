"""The measurements of one scan, against NumPy and SciPy."""

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from liverseg_dist.data.io.dataset_case import DatasetCase
from liverseg_dist.data.label_mapping import LITS_MAPPING
from liverseg_dist.errors import UserError
from liverseg_dist.labels import LITS_SCHEME
from liverseg_dist.planning.fingerprint import QUANTILES, CaseFingerprint
from liverseg_dist.planning.fingerprint_case import (
    MIN_LESION_VOXELS,
    LabelledScan,
    measure_case,
    measure_lesions,
    summarise_intensities,
    try_case,
)
from liverseg_dist.volume import Grid, Volume
from tests.data.sources import write_nifti

SHAPE = (12, 20, 22)
SPACING_MM = (3.0, 1.5, 1.2)
"""z, y, x."""
AFFINE = np.diag([1.2, 1.5, 3.0, 1.0])


def make_label() -> np.ndarray:
    """A block of liver with tumours of 1, 8 and 3 voxels, the last ones joined at a corner."""
    label = np.zeros(SHAPE, np.uint8)
    label[2:10, 4:16, 5:18] = 1
    label[3, 5, 6] = 2
    label[5:7, 8:10, 8:10] = 2
    label[8, 12, 14] = label[8, 13, 15] = label[9, 14, 16] = 2
    return label


def make_image(label: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(1)
    image = (100 + 20 * label + rng.normal(0, 10, SHAPE)).astype(np.int16)
    # A border of zeros, which the content box leaves out.
    image[:, :2], image[:, :, -3:] = 0, 0
    return image


def write_case(folder: Path, image: np.ndarray, label: np.ndarray) -> LabelledScan:
    files = folder / "image.nii.gz", folder / "label.nii.gz"
    for file, voxels in zip(files, (image, label), strict=True):
        write_nifti(file, voxels, AFFINE)
    return LabelledScan(DatasetCase("case", files[0], files[1]), LITS_MAPPING)


def test_lesions_equal_scipys_components() -> None:
    label = make_label()
    volume = Volume(label, Grid(SHAPE, AFFINE))
    found = measure_lesions(volume, LITS_SCHEME)["tumour"]
    # Voxels that touch at a corner are one lesion.
    components, count = ndimage.label(label == 2, structure=np.ones((3, 3, 3)))
    assert count == 3
    sizes = np.bincount(components.reshape(-1))[1:]
    volumes_mm3 = np.sort(sizes[sizes >= MIN_LESION_VOXELS]) * np.prod(SPACING_MM)
    expected = 2 * np.cbrt(3 * volumes_mm3 / (4 * np.pi))
    assert found == pytest.approx(expected, abs=1e-3)


def test_a_single_voxel_is_no_lesion() -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[3, 3, 3] = 2
    assert measure_lesions(Volume(label, Grid(SHAPE, AFFINE)), LITS_SCHEME) == {"tumour": ()}


def test_a_case_is_measured_as_numpy_would(tmp_path: Path) -> None:
    label = make_label()
    image = make_image(label)
    found = measure_case(write_case(tmp_path, image, label), channels=1)
    assert found.shape == SHAPE
    assert found.spacing_mm == pytest.approx(SPACING_MM)
    assert found.content_shape == (12, 18, 19)
    # The liver's block with its tumours: 8 x 12 x 13 voxels.
    assert found.foreground_mm == pytest.approx((8 * 3.0, 12 * 1.5, 13 * 1.2))
    assert found.structure_voxels == {
        "liver": int((label > 0).sum()),
        "tumour": int((label == 2).sum()),
    }
    (intensity,) = found.intensities
    assert intensity is not None
    inside = image[label > 0].astype(np.float64)
    assert intensity.mean == pytest.approx(inside.mean())
    assert intensity.std == pytest.approx(inside.std())
    assert intensity.quantiles == pytest.approx(np.quantile(inside, QUANTILES))


def test_a_case_is_read_back_from_json(tmp_path: Path) -> None:
    label = make_label()
    found = measure_case(write_case(tmp_path, make_image(label), label), channels=1)
    assert CaseFingerprint.from_json(found.to_json()) == found


@pytest.mark.parametrize("key", ["case_id", "shape", "spacing_mm", "intensities", "files"])
def test_a_damaged_entry_is_refused(key: str, tmp_path: Path) -> None:
    label = make_label()
    content = measure_case(write_case(tmp_path, make_image(label), label), channels=1).to_json()
    del content[key]
    with pytest.raises((KeyError, TypeError, ValueError)):
        CaseFingerprint.from_json(content)


def test_quantiles_of_another_version_are_refused(tmp_path: Path) -> None:
    label = make_label()
    content = measure_case(write_case(tmp_path, make_image(label), label), channels=1).to_json()
    content["intensities"][0]["quantiles"] = [0.0, 1.0]
    with pytest.raises(ValueError, match="another number of quantiles"):
        CaseFingerprint.from_json(content)


def test_an_empty_label_has_no_foreground(tmp_path: Path) -> None:
    label = np.zeros(SHAPE, np.uint8)
    found = measure_case(write_case(tmp_path, make_image(label), label), channels=1)
    assert found.foreground_mm == (0, 0, 0)
    assert found.intensities == ()
    assert found.lesion_diameters_mm == {"tumour": ()}


def test_files_of_different_sizes_are_refused(tmp_path: Path) -> None:
    label = make_label()
    scan = write_case(tmp_path, make_image(label), label[:-1])
    with pytest.raises(UserError, match="image is 12x20x22 voxels, label 11x20x22"):
        measure_case(scan, channels=1)


def test_a_value_without_a_name_is_refused(tmp_path: Path) -> None:
    label = make_label()
    label[0, 0, 0] = 7
    scan = write_case(tmp_path, make_image(label), label)
    with pytest.raises(UserError, match="label value 7 is not one of"):
        measure_case(scan, channels=1)


def test_a_worker_returns_the_reason_instead_of_an_error(tmp_path: Path) -> None:
    label = make_label()
    scan = write_case(tmp_path, make_image(label), label)
    assert try_case(scan, 1).fingerprint is not None
    (tmp_path / "image.nii.gz").write_bytes(b"no scan")
    damaged = try_case(scan, 1)
    assert damaged.fingerprint is None
    assert damaged.reason
    (tmp_path / "image.nii.gz").unlink()
    assert try_case(scan, 1).reason == "No such file or directory"


def test_values_that_are_not_finite_are_left_out() -> None:
    values = np.array([1.0, 2.0, np.nan, 3.0, np.inf])
    found = summarise_intensities(values)
    assert (found.mean, found.quantiles[0], found.quantiles[-1]) == (2.0, 1.0, 3.0)
    assert summarise_intensities(np.array([np.nan])).quantiles == (0.0,) * len(QUANTILES)


def test_a_changed_file_has_another_state(tmp_path: Path) -> None:
    label = make_label()
    scan = write_case(tmp_path, make_image(label), label)
    before = scan.file_states()
    assert scan.file_states() == before
    with (tmp_path / "label.nii.gz").open("ab") as file:
        file.write(b"x")
    assert scan.file_states() != before
