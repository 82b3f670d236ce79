"""Volumes and diameters of shapes of known size: the figures that `clinical.diameters` states."""

import numpy as np
import pytest

from liverseg_dist.clinical.diameters import longest_diameter_mm, measure_axial_diameters
from liverseg_dist.clinical.shape import OrganSurface, sphericity, surface_area_mm2
from liverseg_dist.volume import Grid
from tests.clinical.shapes import Ellipsoid, random_ellipsoids

COUNT = 30


def measure_errors(spacing_mm: tuple[float, float, float], balls: bool) -> np.ndarray:
    """Errors (count, 3) of long axis, short axis and longest 3D diameter, mm."""
    errors = []
    for shape, shift in random_ellipsoids(COUNT, 5.0, 22.0):
        if balls:
            shape = Ellipsoid((shape.half_axes_mm[0],) * 3, shape.seed)
        x, y, z = shift * spacing_mm[::-1]
        volume = shape.on_grid(spacing_mm, (x, y, z))
        axial = measure_axial_diameters(volume.voxels, volume.grid)
        long_mm, short_mm = shape.axial_mm
        longest = longest_diameter_mm(volume.voxels, volume.grid) - shape.longest_mm
        errors.append((axial.long_mm - long_mm, axial.short_mm - short_mm, longest))
    return np.array(errors)


@pytest.mark.parametrize("balls", [False, True], ids=["ellipsoids", "balls"])
@pytest.mark.parametrize("pixel_mm", [0.7, 1.0])
def test_thin_slices(pixel_mm: float, balls: bool) -> None:
    """The goal: 0.3 mm on average and one voxel at most."""
    errors = measure_errors((1.0, pixel_mm, pixel_mm), balls)
    assert abs(errors[:, 0].mean()) <= 0.3
    assert np.abs(errors[:, 0]).max() <= 1.0
    assert abs(errors[:, 1].mean()) <= 0.3
    assert abs(errors[:, 2].mean()) <= 0.5


def test_thick_slices_as_stated() -> None:
    errors = measure_errors((5.0, 0.7, 0.7), balls=False)
    assert abs(errors[:, 0].mean()) <= 0.3
    assert np.abs(errors[:, 0]).max() <= 1.8
    assert -0.1 < errors[:, 2].mean() <= 1.0
    assert np.abs(errors[:, 2]).max() <= 2.3


def test_a_turned_or_sheared_grid_gives_the_same_millimetres() -> None:
    volume = Ellipsoid((14.0, 9.0, 7.0), 3).on_grid((1.0, 0.8, 0.8))
    axial = measure_axial_diameters(volume.voxels, volume.grid)
    angle = np.radians(25)
    turn = np.eye(4)
    turn[:3, :3] = [
        [np.cos(angle), -np.sin(angle), 0],
        [np.sin(angle), np.cos(angle), 0],
        [0, 0, 1],
    ]
    turned = Grid(volume.shape, turn @ volume.affine)
    again = measure_axial_diameters(volume.voxels, turned)
    assert again.long_mm == pytest.approx(axial.long_mm)
    assert again.short_mm == pytest.approx(axial.short_mm)
    # A tilted gantry moves slices against each other and changes none of them.
    tilted = volume.affine.copy()
    tilted[1, 2] = 0.4
    assert measure_axial_diameters(
        volume.voxels, Grid(volume.shape, tilted)
    ).long_mm == pytest.approx(axial.long_mm)


def test_the_axes_end_where_they_were_measured() -> None:
    volume = Ellipsoid((18.0, 8.0, 6.0), 5).on_grid((1.0, 0.7, 0.7))
    axial = measure_axial_diameters(volume.voxels, volume.grid)
    long_ends, short_ends = (
        volume.grid.world_mm(ends) for ends in (axial.long_ends_zyx, axial.short_ends_zyx)
    )
    assert np.linalg.norm(long_ends[1] - long_ends[0]) == pytest.approx(axial.long_mm)
    assert np.linalg.norm(short_ends[1] - short_ends[0]) == pytest.approx(axial.short_mm)
    assert (long_ends[1] - long_ends[0]) @ (short_ends[1] - short_ends[0]) == pytest.approx(
        0, abs=1e-6
    )
    assert (axial.long_ends_zyx[:, 0] == axial.slice_index).all()
    assert axial.short_mm <= axial.long_mm


def test_one_voxel_and_one_row() -> None:
    grid = Grid((1, 3, 9), np.diag([0.5, 0.5, 3.0, 1.0]))
    mask = np.zeros(grid.shape, dtype=bool)
    mask[0, 1, 2] = True
    one = measure_axial_diameters(mask, grid)
    assert 0 < one.short_mm <= one.long_mm <= 0.5
    mask[0, 1, 1:8] = True
    row = measure_axial_diameters(mask, grid)
    assert row.long_mm == pytest.approx(7 * 0.5 - 0.3)


@pytest.mark.parametrize("radius", [5.0, 10.0, 18.0])
def test_sphericity_of_a_ball(radius: float) -> None:
    volume = Ellipsoid((radius,) * 3).on_grid((1.0, 0.8, 0.8), (0.2, 0.1, 0.3))
    assert surface_area_mm2(volume.voxels, volume.grid) == pytest.approx(
        4 * np.pi * radius**2, rel=0.02
    )
    value = sphericity(volume.voxels, volume.grid)
    assert value is not None
    assert value >= 0.98


def test_sphericity_of_a_cigar_against_its_formula() -> None:
    shape = Ellipsoid((24.0, 8.0, 8.0), 2)
    volume = shape.on_grid((1.0, 1.0, 1.0))
    # Surface of a prolate spheroid.
    excentricity = np.sqrt(1 - (8 / 24) ** 2)
    area = 2 * np.pi * 8**2 * (1 + 24 / (8 * excentricity) * np.arcsin(excentricity))
    expected = np.pi ** (1 / 3) * (6000 * shape.volume_ml) ** (2 / 3) / area
    assert sphericity(volume.voxels, volume.grid) == pytest.approx(expected, rel=0.02)


def test_a_speck_has_no_sphericity() -> None:
    grid = Grid((4, 4, 4), np.eye(4))
    mask = np.zeros(grid.shape, dtype=bool)
    mask[1:3, 1:3, 1:3] = True
    assert sphericity(mask, grid) is None


def test_distance_to_the_organs_surface() -> None:
    grid = Grid((40, 60, 60), np.diag([0.8, 0.8, 2.0, 1.0]))
    organ = np.zeros(grid.shape, dtype=bool)
    organ[5:35, 10:50, 10:50] = True
    lesion = np.zeros(grid.shape, dtype=bool)
    lesion[15:20, 20:25, 15:22] = True  # 5 voxels of 0.8 mm from the face at x = 10
    surface = OrganSurface(organ, grid)
    assert surface.distance_mm(lesion, grid) == pytest.approx(4.0)
    lesion[15:20, 20:25, 10:22] = True
    assert surface.distance_mm(lesion, grid) == 0.0
    # Where the scan ends, the organ has no surface.
    cut = OrganSurface(organ[5:35, 10:50, 10:50], grid.cropped((5, 10, 10), (30, 40, 40)))
    assert (
        cut.distance_mm(lesion[5:35, 10:50, 10:50], grid.cropped((5, 10, 10), (30, 40, 40))) is None
    )
