"""A label on another grid than its image: when voxels are kept, and when they are resampled."""

import numpy as np
import pytest

from liverseg_dist.data.audit.label_geometry import (
    has_identity_affine,
    match_label,
    measure_offset_mm,
)
from liverseg_dist.volume import Grid, Volume

SHAPE = (8, 10, 12)
SPACING_MM = (1.5, 1.0, 2.0)
"""x, y, z, as in an affine."""


def make_affine(shift_mm: float = 0.0) -> np.ndarray:
    affine = np.diag([*SPACING_MM, 1.0])
    affine[:3, 3] = (-40.0 + shift_mm, 7.0, 100.0)
    return affine


def make_label(affine: np.ndarray, shape: tuple[int, int, int] = SHAPE) -> Volume:
    voxels = np.zeros(shape, np.uint8)
    voxels[2:5, 3:6, 4:9] = 1
    voxels[3, 4, 5] = 2
    return Volume(voxels, Grid(shape, affine))


IMAGE = Grid(SHAPE, make_affine())


def list_codes(label: Volume) -> list[str]:
    return [finding.code for finding in match_label(IMAGE, label).findings]


def test_the_same_grid_is_used_without_a_finding() -> None:
    label = make_label(make_affine())
    found = match_label(IMAGE, label)
    assert found.label is not None
    assert found.findings == ()
    assert np.array_equal(found.label.voxels, label.voxels)


@pytest.mark.parametrize(
    ("shift_mm", "codes"),
    [(0.45, ["label_shifted"]), (0.55, ["label_resampled"])],
)
def test_the_limit_is_half_of_the_smallest_voxel_edge(shift_mm: float, codes: list[str]) -> None:
    """The smallest edge is 1 mm."""
    label = make_label(make_affine(shift_mm))
    assert list_codes(label) == codes
    found = match_label(IMAGE, label).label
    assert found is not None
    assert np.array_equal(found.voxels, label.voxels), "nearest voxels: the shift is under one"


def test_another_orientation_is_permuted_back() -> None:
    label = make_label(make_affine())
    turned = label.reoriented("LPS")
    assert not np.array_equal(turned.voxels, label.voxels)
    found = match_label(IMAGE, turned)
    assert [finding.code for finding in found.findings] == ["label_reoriented"]
    assert found.label is not None
    assert np.array_equal(found.label.voxels, label.voxels)
    assert found.label.grid.matches(IMAGE)


def test_a_lost_header_is_replaced_only_where_the_shape_is_equal() -> None:
    assert list_codes(make_label(np.eye(4))) == ["label_header_lost"]
    found = match_label(IMAGE, make_label(np.eye(4), (8, 10, 13)))
    assert found.label is None, "elsewhere in the world: no labelled voxel is in the image"
    assert [finding.code for finding in found.findings] == ["label_no_overlap"]
    assert found.findings[0].severity == "error"


def test_a_label_that_is_cut_by_the_image_is_reported_with_its_share() -> None:
    label = make_label(make_affine(shift_mm=-9.0))
    found = match_label(IMAGE, label)
    codes = [finding.code for finding in found.findings]
    assert codes == ["label_resampled", "label_cut"]
    # 6 voxels of 1.5 mm to the left: two of the five columns from 4 on are outside.
    assert found.findings[1].message == "40 % of the label is outside the image"


@pytest.mark.parametrize(
    ("affine", "expected"),
    [
        (np.eye(4), True),
        (np.diag([-1.0, 1.0, -1.0, 1.0]), True),
        (np.diag([1.0, 1.0, 1.001, 1.0]), False),
        (make_affine(), False),
    ],
)
def test_identity_affine(affine: np.ndarray, expected: bool) -> None:
    assert has_identity_affine(Grid(SHAPE, affine)) is expected


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "LAS", "SAR"])
def test_offset_is_to_the_patients_right_in_any_orientation(orientation: str) -> None:
    """Columns grow to the patient's right; the organ fills the last quarter of the body."""
    hu = np.full((4, 40, 48), -1000, np.int16)
    hu[:, 4:36, 4:44] = 40
    organ = np.zeros(hu.shape, np.uint8)
    organ[1:3, 4:36, 34:44] = 1
    grid = Grid(hu.shape, np.diag([2.0, 2.0, 5.0, 1.0]))
    image = Volume(hu, grid).reoriented(orientation)
    found = measure_offset_mm(image, Volume(organ, grid).reoriented(orientation))
    assert found == pytest.approx(2.0 * (38.5 - 23.5), abs=2.0 * 4 / 2)


def test_no_offset_without_an_organ_or_a_body() -> None:
    grid = Grid(SHAPE, make_affine())
    air = Volume(np.full(SHAPE, -1000, np.int16), grid)
    empty = Volume(np.zeros(SHAPE, np.uint8), grid)
    assert measure_offset_mm(air, empty) is None
    assert measure_offset_mm(air, make_label(make_affine())) is None
