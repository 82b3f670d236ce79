"""Quantities of whole cases: exact volumes, burden, cuts, schemes of any data set, orientation."""

import nibabel as nib
import numpy as np
import pytest

from liverseg_dist.clinical.quantify import CaseQuantities, quantify_case
from liverseg_dist.label_scheme import scheme_from_labels
from liverseg_dist.labels import LITS_SCHEME, LabelScheme
from liverseg_dist.volume import Grid, Volume
from tests.clinical.shapes import Ellipsoid

GRID = Grid(
    (40, 90, 100), np.array([[-1.0, 0, 0, 50], [0, -1.0, 0, 40], [0, 0, 2.5, -30], [0, 0, 0, 1.0]])
)
BALLS = (((6.0, 6.0, 6.0), (10.0, 0.0, 20.0)), ((9.0, 7.0, 5.0), (-15.0, -10.0, 15.0)))


def make_case() -> Volume:
    """A liver with two tumours, stored left-posterior-superior."""
    liver = Ellipsoid((40.0, 35.0, 32.0)).mask(GRID, (0.0, -4.0, 18.0))
    label = liver.astype(np.uint8)
    for half_axes, centre in BALLS:
        label[Ellipsoid(half_axes, 4).mask(GRID, centre)] = 2
    return Volume(label, GRID)


def quantities(case: Volume, scheme: LabelScheme = LITS_SCHEME) -> CaseQuantities:
    return quantify_case(case, scheme)


def test_volumes_are_exact_to_the_voxel() -> None:
    case = make_case()
    result = quantities(case)
    liver, tumour = result.structures
    voxel_ml = 1.0 * 1.0 * 2.5 / 1000
    assert liver.volume_ml == pytest.approx((case.voxels > 0).sum() * voxel_ml, rel=1e-12)
    assert tumour.volume_ml == pytest.approx((case.voxels == 2).sum() * voxel_ml, rel=1e-12)
    assert sum(lesion.volume_ml for lesion in result.lesions) == pytest.approx(tumour.volume_ml)
    assert tumour.burden == pytest.approx(tumour.volume_ml / liver.volume_ml)
    assert liver.burden == tumour.burden
    assert [lesion.number for lesion in result.lesions] == [1, 2]
    assert result.lesions[0].volume_ml > result.lesions[1].volume_ml


def test_centroids_are_in_patient_coordinates() -> None:
    found = {lesion.number: lesion.centroid_mm for lesion in quantities(make_case()).lesions}
    assert found[1] == pytest.approx(BALLS[1][1], abs=0.2)
    assert found[2] == pytest.approx(BALLS[0][1], abs=0.2)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "SAL"])
def test_the_stored_orientation_changes_nothing(orientation: str) -> None:
    case = make_case()
    expected = quantities(case)
    again = quantities(case.reoriented(orientation))
    assert nib.aff2axcodes(case.reoriented(orientation).affine) == tuple(orientation)
    for one, other in zip(expected.lesions, again.lesions, strict=True):
        assert other.volume_ml == pytest.approx(one.volume_ml)
        assert other.long_axis_mm == pytest.approx(one.long_axis_mm)
        assert other.short_axis_mm == pytest.approx(one.short_axis_mm)
        assert other.surface_distance_mm == pytest.approx(one.surface_distance_mm)
        assert other.centroid_mm == pytest.approx(one.centroid_mm)


def test_what_the_scan_cuts_is_marked_and_still_measured() -> None:
    case = make_case()
    cut = case.cropped((18, 0, 0), (22, 90, 100))
    result = quantities(cut)
    liver, tumour = result.structures
    assert liver.cut_by == ("inferior",)
    assert liver.volume_ml == pytest.approx((cut.voxels > 0).sum() * 0.0025)
    assert tumour.cut_by == ("inferior",)
    assert [lesion.cut_by for lesion in result.lesions] == [("inferior",), ("inferior",)]
    assert all(lesion.volume_ml > 0 for lesion in result.lesions)
    sideways = case.cropped((0, 0, 0), (40, 90, 58)).reoriented()
    assert "left" in quantities(sideways).structures[0].cut_by


def test_voxels_without_annotation_cut_as_well() -> None:
    case = make_case()
    label = case.voxels.copy()
    label[:16] = 255
    result = quantities(case.with_voxels(label))
    assert result.structures[0].cut_by == ("unlabelled",)
    assert result.lesions[0].cut_by == ("unlabelled",)


def test_an_empty_mask_has_volumes_of_zero() -> None:
    result = quantities(Volume(np.zeros(GRID.shape, np.uint8), GRID))
    assert [(s.volume_ml, s.burden, s.centroid_mm) for s in result.structures] == [
        (0.0, None, None)
    ] * 2
    assert result.lesions == ()


def test_any_scheme_is_measured() -> None:
    """The same voxels under other numbers and names; two organs, lesions in one of them."""
    case = make_case()
    numbers = np.array([0, 6, 40], dtype=np.uint8)
    scheme = scheme_from_labels(
        {"background": 0, "leber": [6, 40], "herd metastases": 40, "spleen": 3}
    )
    label = numbers[case.voxels]
    label[0, :5, :5] = 3
    result = quantities(case.with_voxels(label), scheme)
    assert [s.structure for s in result.structures] == ["leber", "herd metastases", "spleen"]
    expected = quantities(case)
    assert result.structures[0].volume_ml == expected.structures[0].volume_ml
    assert result.structures[2].volume_ml == pytest.approx(25 * 0.0025)
    assert result.structures[2].burden is None
    for one, other in zip(expected.lesions, result.lesions, strict=True):
        assert other.structure == "herd metastases"
        assert other.long_axis_mm == one.long_axis_mm
        assert other.surface_distance_mm == one.surface_distance_mm


def test_values_of_the_image_and_of_probabilities() -> None:
    case = make_case()
    image = np.full(GRID.shape, 100, np.int16)
    image[case.voxels == 2] = 60
    tumour = (case.voxels == 2).astype(np.float32)
    soft = 0.5 * tumour + 0.5 * np.roll(tumour, 1, axis=2)
    result = quantify_case(case, LITS_SCHEME, Volume(image, GRID), {"tumour": Volume(soft, GRID)})
    lesion = result.lesions[0]
    assert lesion.intensity is not None
    assert (lesion.intensity.mean, lesion.intensity.sd) == (60.0, 0.0)
    assert lesion.volume_range is not None
    assert lesion.volume_range.low < lesion.volume_ml < lesion.volume_range.high
    assert lesion.volume_range.expected == pytest.approx(lesion.volume_ml, rel=1e-5)
    whole = result.structures[1].volume_range
    assert whole is not None
    assert whole.expected == pytest.approx(result.structures[1].volume_ml, rel=1e-5)
    with pytest.raises(ValueError, match="grid"):
        quantify_case(case, LITS_SCHEME, Volume(image[:-1], GRID.cropped((0, 0, 0), (39, 90, 100))))


def test_lesions_that_touch_at_an_edge_follow_the_connectivity() -> None:
    label = np.ones((6, 8, 8), np.uint8)
    label[2, 2, 2] = label[2, 3, 3] = 2
    case = Volume(label, Grid(label.shape, np.eye(4)))
    assert len(quantify_case(case, LITS_SCHEME).lesions) == 2
    assert len(quantify_case(case, LITS_SCHEME, connectivity=18).lesions) == 1
