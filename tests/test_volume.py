"""Grid and Volume: equality with nibabel; no operation moves a voxel in the world."""

import json

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from liverseg_dist.volume import Grid, Volume, plan_reorientation
from tests.data.geometry import ALL_ORIENTATIONS, grids, locate_values, numbered

orientations = st.sampled_from(ALL_ORIENTATIONS)
boxes = st.tuples(*[st.tuples(st.integers(-4, 8), st.integers(1, 9))] * 3)


def has_clear_orientation(grid: Grid) -> bool:
    """Whether no axis is near 45 degrees, where the nearest orientation is ambiguous."""
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

    reoriented = volume.reoriented(orientation)

    assert reoriented.grid.orientation == orientation
    np.testing.assert_array_equal(reoriented.voxels, np.asarray(reference.dataobj).T)
    np.testing.assert_allclose(reoriented.affine, reference.affine, atol=1e-12)


@given(grids(sheared=True), orientations)
def test_reorientation_keeps_world_positions(grid: Grid, orientation: str) -> None:
    volume = numbered(grid)
    reoriented = volume.reoriented(orientation)
    np.testing.assert_allclose(locate_values(reoriented), locate_values(volume), atol=1e-9)
    assert reoriented.grid.voxel_volume_ml == pytest.approx(grid.voxel_volume_ml)


@given(grids(), orientations)
def test_reorientation_and_back_is_identity(grid: Grid, orientation: str) -> None:
    assume(has_clear_orientation(grid))
    volume = numbered(grid)
    reoriented = volume.reoriented(orientation)
    assert reoriented.grid.orientation == orientation
    back = reoriented.reoriented(grid.orientation)
    np.testing.assert_array_equal(back.voxels, volume.voxels)
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-9)


@given(grids(), orientations)
def test_reorientation_follows_plan(grid: Grid, orientation: str) -> None:
    volume = numbered(grid)
    target, axes, flips = plan_reorientation(grid, orientation)
    expected = np.flip(volume.voxels.transpose(axes), [axis for axis in range(3) if flips[axis]])
    np.testing.assert_array_equal(volume.reoriented(orientation).voxels, expected)
    assert target.shape == expected.shape


@given(grids(sheared=True), boxes)
def test_crop_keeps_world_positions(grid: Grid, box: tuple[tuple[int, int], ...]) -> None:
    volume = numbered(grid)
    start, shape = [s for s, _ in box], [n for _, n in box]
    cropped = volume.cropped(start, shape, fill=-1)
    assert cropped.shape == tuple(shape)
    index = np.argwhere(cropped.voxels >= 0)
    kept = cropped.voxels[tuple(index.T)]
    np.testing.assert_allclose(cropped.grid.world_mm(index), locate_values(volume)[kept], atol=1e-9)
    inside = [
        max(0, min(s + n, size) - max(s, 0))
        for s, n, size in zip(start, shape, grid.shape, strict=True)
    ]
    assert len(kept) == np.prod(inside)


@given(grids(), boxes)
def test_padding_and_cropping_is_identity(grid: Grid, box: tuple[tuple[int, int], ...]) -> None:
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
def test_spacing_and_orientation_equal_nibabel(grid: Grid) -> None:
    np.testing.assert_allclose(grid.spacing_mm, nib.affines.voxel_sizes(grid.affine)[::-1])
    assert grid.orientation == "".join(nib.aff2axcodes(grid.affine))
    index = np.array([1, 0, 2])
    np.testing.assert_allclose(
        grid.world_mm(index), nib.affines.apply_affine(grid.affine, index[::-1]), atol=1e-9
    )


@given(grids(sheared=True), st.tuples(*[st.floats(0.4, 5, allow_nan=False)] * 3))
def test_new_spacing_keeps_outer_faces(grid: Grid, spacing_mm: tuple[float, float, float]) -> None:
    other = grid.with_spacing(spacing_mm)
    for corner in (np.zeros(3), np.ones(3)):
        face = corner * np.array(grid.shape) - 0.5
        other_face = corner * np.array(other.shape) - 0.5
        np.testing.assert_allclose(other.world_mm(other_face), grid.world_mm(face), atol=1e-6)
    length = np.array(grid.shape) * grid.spacing_mm
    within_half_a_voxel = np.abs(length / np.array(spacing_mm) - other.shape) <= 0.5 + 1e-9
    assert (within_half_a_voxel | (np.array(other.shape) == 1)).all()


@given(grids(sheared=True))
def test_json_is_lossless(grid: Grid) -> None:
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
def test_rotation_is_not_shear(grid: Grid) -> None:
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
def test_invalid_affines_are_refused(affine: np.ndarray) -> None:
    with pytest.raises(ValueError, match="affine"):
        Grid((1, 1, 1), affine)


def test_voxels_must_have_shape_of_grid() -> None:
    with pytest.raises(ValueError, match="shape"):
        Volume(np.zeros((2, 3, 4)), Grid((4, 3, 2), np.eye(4)))


def test_grid_is_immutable() -> None:
    affine = np.eye(4)
    grid = Grid((1, 2, 3), affine)
    affine[0, 0] = 5
    assert grid.spacing_mm == (1, 1, 1)
    with pytest.raises(ValueError):
        grid.affine[0, 0] = 5
