"""Rigid registration of channels: a known motion is found, and nothing moves without reason."""

import math

import numpy as np
import pytest
from scipy import ndimage

from liverseg_dist.data.preprocessing.channel_registration import RigidAlignment, register_rigid
from liverseg_dist.volume import Grid, Volume

SHAPE = (32, 48, 48)
SPACING_MM = 3.0


def make_grid() -> Grid:
    return Grid(SHAPE, np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0]))


def make_body(seed: int = 3) -> np.ndarray:
    """Smooth blobs inside an ellipsoid: a structure that no other position matches."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 3)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    inside = (z / 0.8) ** 2 + (y / 0.7) ** 2 + (x / 0.85) ** 2 < 1
    return np.where(inside, 500 + 4000 * field, 0).astype(np.int16)


def other_contrast(voxels: np.ndarray) -> np.ndarray:
    """The same anatomy in another modality: dark becomes bright, not linearly."""
    return np.where(voxels > 0, 900 - 0.6 * voxels + 40 * np.sin(voxels / 60), 0).astype(np.int16)


def motion(shift_mm: tuple[float, float, float], degrees: float) -> np.ndarray:
    """A rotation about z through the centre of the scan, then a shift; world coordinates."""
    angle = math.radians(degrees)
    rotation = np.eye(4)
    rotation[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    centre = np.eye(4)
    centre[:3, 3] = make_grid().world_mm((np.array(SHAPE) - 1) / 2)
    result = centre @ rotation @ np.linalg.inv(centre)
    result[:3, 3] += shift_mm
    return result


def largest_error_mm(found: np.ndarray, truth: np.ndarray) -> float:
    """Largest distance between two transforms inside the body, which fills half of the edges."""
    grid = make_grid()
    middle, half = (np.array(SHAPE) - 1) / 2, np.array(SHAPE) / 4
    signs = np.array(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, -1).T
    world = grid.world_mm(middle + signs * half)
    homogeneous = np.column_stack([world, np.ones(len(world))])
    difference = (homogeneous @ found.T - homogeneous @ truth.T)[:, :3]
    return float(np.linalg.norm(difference, axis=1).max())


@pytest.mark.parametrize(
    ("shift_mm", "degrees"),
    [((6.0, -4.0, 3.0), 0.0), ((0.0, 0.0, 0.0), 4.0), ((5.0, 3.0, -4.0), -3.0)],
)
def test_a_known_motion_is_undone(shift_mm: tuple[float, float, float], degrees: float) -> None:
    body = make_body()
    moved = motion(shift_mm, degrees)
    # The header of the other channel is wrong by this motion; its voxels are in place.
    fixed = Volume(body, make_grid())
    moving = Volume(other_contrast(body), Grid(SHAPE, moved @ make_grid().affine))
    found = register_rigid(fixed, moving)
    assert found.is_better
    # Half a voxel.
    assert largest_error_mm(found.matrix @ moved, np.eye(4)) < SPACING_MM / 2


def test_channels_in_place_stay_there() -> None:
    body = make_body()
    found = register_rigid(Volume(body, make_grid()), Volume(other_contrast(body), make_grid()))
    assert largest_error_mm(found.matrix, np.eye(4)) < SPACING_MM / 4


def test_the_same_scan_gives_the_same_numbers() -> None:
    body = make_body()
    moving = Volume(other_contrast(body), Grid(SHAPE, motion((4, 2, 0), 2) @ make_grid().affine))
    first, second = (register_rigid(Volume(body, make_grid()), moving) for _ in range(2))
    assert np.array_equal(first.matrix, second.matrix)
    assert first.mutual_information_after == second.mutual_information_after


def test_a_constant_channel_is_not_moved() -> None:
    constant = Volume(np.full(SHAPE, 100, np.int16), make_grid())
    assert not register_rigid(Volume(make_body(), make_grid()), constant).is_better


def test_the_record_states_rotation_and_shift() -> None:
    alignment = RigidAlignment(motion((3, 4, 0), 10), 0.1, 0.5)
    assert alignment.rotation_degrees == pytest.approx(10)
    assert alignment.shift_mm(make_grid()) == pytest.approx(5)
    record = alignment.to_json()
    assert record["method"] == "rigid"
    assert np.allclose(record["matrix"], alignment.matrix)
    assert not RigidAlignment(np.eye(4), 0.5, 0.5).is_better
