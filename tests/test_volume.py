"""Grid and Volume against nibabel, and as properties: whatever is done to a volume, no voxel moves in the world."""

import json

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from liverseg_dist.volume import Grid, Volume, plan_reorientation
from tests.data.geometry import ALL_ORIENTATIONS, grids, numbered, places

orientations = st.sampled_from(ALL_ORIENTATIONS)
boxes = st.tuples(*[st.tuples(st.integers(-4, 8), st.integers(1, 9))] * 3)


def clearly_oriented(grid: Grid) -> bool:
    """Not within rounding of 45 degrees, where the nearest orientation is a matter of taste."""
    directions = np.abs(grid.affine[:3, :3] / np.linalg.norm(grid.affine[:3, :3], axis=0))
    ordered = np.sort(directions, axis=0)
    return (
        bool((ordered[2] - ordered[1]).min() > 1e-3)
        and len(set(np.argmax(directions, axis=0))) == 3
    )


@pytest.mark.parametrize("orientation", ALL_ORIENTATIONS)
def test_reorientation_equals_nibabel(orientation: str) -> None:
    volume = numbered(
        Grid((3, 4, 5), np.array([[0, -2.0, 0, 7], [0, 0, 3.0, -5], [0.5, 0, 0, 1], [0, 0, 0, 1]]))
    )
    image = nib.Nifti1Image(volume.voxels.T, volume.affine)
    change = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(volume.affine),
        nib.orientations.axcodes2ornt(tuple(orientation)),
    )
    reference = image.as_reoriented(change)

    turned = volume.reoriented(orientation)

    assert turned.grid.orientation == orientation
    np.testing.assert_array_equal(turned.voxels, np.asarray(reference.dataobj).T)
    np.testing.assert_allclose(turned.affine, reference.affine, atol=1e-12)


@given(grids(sheared=True), orientations)
def test_reorientation_moves_no_voxel_in_the_world(grid: Grid, orientation: str) -> None:
    volume = numbered(grid)
    turned = volume.reoriented(orientation)
    np.testing.assert_allclose(places(turned), places(volume), atol=1e-9)
    assert turned.grid.voxel_volume_ml == pytest.approx(grid.voxel_volume_ml)


@given(grids(), orientations)
def test_forward_then_back_returns_every_voxel(grid: Grid, orientation: str) -> None:
    assume(clearly_oriented(grid))
    volume = numbered(grid)
    turned = volume.reoriented(orientation)
    assert turned.grid.orientation == orientation
    back = turned.reoriented(grid.orientation)
    np.testing.assert_array_equal(back.voxels, volume.voxels)
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-9)


@given(grids(), orientations)
def test_reorientation_says_what_it_does(grid: Grid, orientation: str) -> None:
    volume = numbered(grid)
    target, axes, flips = plan_reorientation(grid, orientation)
    by_hand = np.flip(volume.voxels.transpose(axes), [axis for axis in range(3) if flips[axis]])
    np.testing.assert_array_equal(volume.reoriented(orientation).voxels, by_hand)
    assert target.shape == by_hand.shape


@given(grids(sheared=True), boxes)
def test_a_crop_moves_no_voxel(grid: Grid, box: tuple[tuple[int, int], ...]) -> None:
    volume = numbered(grid)
    start, shape = [s for s, _ in box], [n for _, n in box]
    cropped = volume.cropped(start, shape, fill=-1)
    assert cropped.shape == tuple(shape)
    index = np.argwhere(cropped.voxels >= 0)
    kept = cropped.voxels[tuple(index.T)]
    np.testing.assert_allclose(cropped.grid.world_mm(index), places(volume)[kept], atol=1e-9)
    inside = [
        max(0, min(s + n, size) - max(s, 0))
        for s, n, size in zip(start, shape, grid.shape, strict=True)
    ]
    assert len(kept) == np.prod(inside)


@given(grids(), boxes)
def test_padding_then_cropping_back_is_the_identity(
    grid: Grid, box: tuple[tuple[int, int], ...]
) -> None:
    volume = numbered(grid)
    margin = [abs(s) for s, _ in box]
    padded = volume.cropped(
        [-m for m in margin], [n + 2 * m for n, m in zip(grid.shape, margin, strict=True)], fill=-1
    )
    back = padded.cropped(margin, grid.shape)
    np.testing.assert_array_equal(back.voxels, volume.voxels)
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-9)


@given(
    grids(sheared=True),
    st.lists(st.tuples(*[st.floats(-9, 9, allow_nan=False)] * 3), min_size=1, max_size=5),
)
def test_world_and_index_are_inverse(grid: Grid, index: list[tuple[float, float, float]]) -> None:
    np.testing.assert_allclose(grid.index_of(grid.world_mm(np.array(index))), index, atol=1e-6)


@given(grids(sheared=True))
def test_sizes_equal_nibabels(grid: Grid) -> None:
    np.testing.assert_allclose(grid.spacing_mm, nib.affines.voxel_sizes(grid.affine)[::-1])
    assert grid.orientation == "".join(nib.aff2axcodes(grid.affine))
    index = np.array([1, 0, 2])
    np.testing.assert_allclose(
        grid.world_mm(index), nib.affines.apply_affine(grid.affine, index[::-1]), atol=1e-9
    )


@given(grids(sheared=True), st.tuples(*[st.floats(0.4, 5, allow_nan=False)] * 3))
def test_outer_faces_stay_when_the_spacing_changes(
    grid: Grid, spacing_mm: tuple[float, float, float]
) -> None:
    other = grid.with_spacing(spacing_mm)
    for corner in (np.zeros(3), np.ones(3)):
        face = corner * np.array(grid.shape) - 0.5
        other_face = corner * np.array(other.shape) - 0.5
        np.testing.assert_allclose(other.world_mm(other_face), grid.world_mm(face), atol=1e-6)
    length = np.array(grid.shape) * grid.spacing_mm
    within_half_a_voxel = np.abs(length / np.array(spacing_mm) - other.shape) <= 0.5 + 1e-9
    assert (within_half_a_voxel | (np.array(other.shape) == 1)).all()


@given(grids(sheared=True))
def test_json_keeps_every_bit(grid: Grid) -> None:
    assert Grid.from_json(json.loads(json.dumps(grid.to_json()))) == grid


@given(grids(oblique=False), st.floats(0, 0.099), st.integers(0, 2))
def test_matching_grids(grid: Grid, shift_mm: float, axis: int) -> None:
    affine = grid.affine.copy()
    affine[axis, 3] += shift_mm
    assert grid.matches(Grid(grid.shape, affine))
    affine[axis, 3] += 0.2
    assert not grid.matches(Grid(grid.shape, affine))


@given(grids())
@settings(max_examples=30)
def test_a_rotation_is_no_shear(grid: Grid) -> None:
    assert not grid.is_sheared
    slanted = grid.affine.copy()
    slanted[:3, 2] += (
        0.05 * np.linalg.norm(slanted[:3, 2]) * slanted[:3, 1] / np.linalg.norm(slanted[:3, 1])
    )
    assert Grid(grid.shape, slanted).is_sheared


@pytest.mark.parametrize(
    "affine",
    [np.zeros((4, 4)), np.full((4, 4), np.nan), np.diag([1, 1, 0, 1.0]), np.eye(3)],
    ids=["0", "nan", "flat", "3x3"],
)
def test_impossible_affines_are_refused(affine: np.ndarray) -> None:
    with pytest.raises(ValueError, match="affine"):
        Grid((1, 1, 1), affine)


def test_voxels_must_fit_their_grid() -> None:
    with pytest.raises(ValueError, match="shape"):
        Volume(np.zeros((2, 3, 4)), Grid((4, 3, 2), np.eye(4)))


def test_a_grid_cannot_be_changed_by_its_maker() -> None:
    affine = np.eye(4)
    grid = Grid((1, 2, 3), affine)
    affine[0, 0] = 5
    assert grid.spacing_mm == (1, 1, 1)
    with pytest.raises(ValueError):
        grid.affine[0, 0] = 5
