"""The figures of a mask for volumes.csv, against NumPy and SciPy, and the labels beside masks."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from liverseg_dist.errors import UserError
from liverseg_dist.inference.mask_table import (
    check_dataset_file,
    describe_dataset,
    describe_labels,
    format_mask_line,
    list_volume_columns,
    measure_mask,
    write_dataset_file,
)
from liverseg_dist.label_scheme import read_label_scheme
from liverseg_dist.labels import LITS_SCHEME, LabelScheme, Structure
from liverseg_dist.volume import Grid

KIDNEYS = LabelScheme(
    ((0, "background"), (1, "kidney"), (2, "cyst"), (3, "spleen")),
    (
        Structure("kidney", (1, 2)),
        Structure("cyst", (2,), "lesion", "kidney"),
        Structure("spleen", (3,)),
    ),
)
FREE_LESION = LabelScheme(((0, "background"), (1, "node")), (Structure("node", (1,), "lesion"),))


def make_grid(shape: tuple[int, int, int]) -> Grid:
    """Voxels of 2.5 x 0.8 x 0.7 mm (z, y, x)."""
    return Grid(shape, np.diag([0.7, 0.8, 2.5, 1.0]))


def make_mask(seed: int, values: int) -> np.ndarray:
    """Blobs of all class values."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=(14, 18, 16)), 1.5)
    edges = np.quantile(field, np.linspace(0.5, 1, values)[:-1])
    return np.digitize(field, edges).astype(np.uint8)


def test_volumes_and_counts_equal_numpy_and_scipy() -> None:
    mask = make_mask(seed=1, values=3)
    grid = make_grid(mask.shape)
    found = measure_mask(mask, grid, LITS_SCHEME)
    voxel_ml = 0.7 * 0.8 * 2.5 / 1000
    assert found["liver_ml"] == pytest.approx(np.isin(mask, (1, 2)).sum() * voxel_ml)
    assert found["tumour_ml"] == pytest.approx((mask == 2).sum() * voxel_ml)
    assert found["burden"] == pytest.approx((mask == 2).sum() / (mask > 0).sum())
    # SciPy connects faces by default, as lesions are counted in LiTS.
    assert found["tumours"] == ndimage.label(mask == 2)[1]


def test_voxels_that_touch_at_an_edge_are_two_lesions() -> None:
    mask = np.zeros((3, 4, 4), dtype=np.uint8)
    mask[1, 1, 1] = mask[1, 2, 2] = 2
    assert measure_mask(mask, make_grid(mask.shape), LITS_SCHEME)["tumours"] == 2


def test_an_empty_mask_has_no_burden() -> None:
    mask = np.zeros((4, 5, 6), dtype=np.uint8)
    found = measure_mask(mask, make_grid(mask.shape), LITS_SCHEME)
    assert found == {"liver_ml": 0.0, "tumour_ml": 0.0, "burden": None, "tumours": 0}


def test_other_schemes_name_the_lesion() -> None:
    mask = make_mask(seed=2, values=4)
    found = measure_mask(mask, make_grid(mask.shape), KIDNEYS)
    assert list(found) == ["kidney_ml", "cyst_ml", "spleen_ml", "cyst_burden", "cyst_count"]
    assert found["cyst_burden"] == pytest.approx((mask == 2).sum() / np.isin(mask, (1, 2)).sum())
    assert found["cyst_count"] == ndimage.label(mask == 2)[1]


def test_a_lesion_in_no_organ_has_no_burden() -> None:
    mask = make_mask(seed=3, values=2)
    found = measure_mask(mask, make_grid(mask.shape), FREE_LESION)
    assert list(found) == ["node_ml", "node_count"]


@pytest.mark.parametrize("labels", [LITS_SCHEME, KIDNEYS, FREE_LESION])
def test_every_figure_has_a_column(labels: LabelScheme) -> None:
    mask = np.zeros((4, 5, 6), dtype=np.uint8)
    columns = list_volume_columns(labels, with_channels=True)
    assert set(measure_mask(mask, make_grid(mask.shape), labels)) <= set(columns)
    assert columns[:2] == ("scan", "status")
    assert "channels" in columns
    assert "channels" not in list_volume_columns(labels, with_channels=False)


def test_the_line_for_the_terminal_names_volumes_counts_and_burden() -> None:
    record = {"liver_ml": 1500.04, "tumour_ml": 3.214, "burden": 0.00214, "tumours": 2}
    line = format_mask_line(record, LITS_SCHEME)
    assert line == "liver 1500.0 ml, tumour 3.21 ml in 2, burden 0.21 %"


def test_the_line_leaves_out_an_undefined_burden() -> None:
    record = {"liver_ml": 0.0, "tumour_ml": 0.0, "burden": None, "tumours": 0}
    assert "burden" not in format_mask_line(record, LITS_SCHEME)


@pytest.mark.parametrize("labels", [LITS_SCHEME, KIDNEYS, FREE_LESION])
def test_the_labels_beside_masks_are_read_back(labels: LabelScheme, tmp_path: Path) -> None:
    write_dataset_file(tmp_path, labels)
    read = read_label_scheme(tmp_path / "dataset.json")
    described = [(one.name, one.values, one.kind, one.inside) for one in read.structures]
    assert described == [(one.name, one.values, one.kind, one.inside) for one in labels.structures]


def test_regions_have_nnunets_painting_order() -> None:
    content = describe_dataset(LITS_SCHEME)
    assert content["labels"] == {"background": 0, "liver": [1, 2], "tumour": 2}
    # The liver first; the tumour is painted over it.
    assert content["regions_class_order"] == [1, 2]


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps({"labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}))
    before = file.read_bytes()
    write_dataset_file(tmp_path, LITS_SCHEME)
    assert file.read_bytes() == before


def test_masks_of_other_labels_are_not_mixed(tmp_path: Path) -> None:
    check_dataset_file(tmp_path, LITS_SCHEME)
    write_dataset_file(tmp_path, LITS_SCHEME)
    check_dataset_file(tmp_path, LITS_SCHEME)
    with pytest.raises(
        UserError, match=r"names the labels 1 liver, 2 tumour, the run has 1 kidney"
    ):
        check_dataset_file(tmp_path, KIDNEYS)


def test_labels_in_words_leave_out_background_and_ignore() -> None:
    assert describe_labels(LITS_SCHEME) == "1 liver, 2 tumour"
