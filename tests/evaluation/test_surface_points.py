"""Points of the 3D view against a ball, whose surface and normals are known."""

import base64

import numpy as np
import pytest

from liverseg_dist.evaluation.report.surface_points import (
    KINDS,
    MAX_POINTS,
    VOXEL_MM,
    sample_surface_points,
)

SPACING_MM = (5.0, 2.0, 1.0)
SHAPE = (30, 75, 150)
"""150 mm along each axis."""


def make_ball(centre_mm: tuple[float, float, float], radius_mm: float) -> np.ndarray:
    positions = np.stack(np.indices(SHAPE), axis=-1) * SPACING_MM
    return np.linalg.norm(positions - np.array(centre_mm), axis=-1) <= radius_mm


def decode(view: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, normals (x, y, z) and kinds, as the page reads them."""
    packed = np.frombuffer(base64.b64decode(view["data"]), np.uint8).reshape(-1, 7).astype(float)
    assert len(packed) == view["count"]
    return packed[:, :3] - 127.5, (packed[:, 3:6] - 128) / 127, packed[:, 6].astype(int)


def test_points_of_a_ball_lie_on_it_with_normals_outward() -> None:
    ball = make_ball((75.0, 75.0, 75.0), 50.0).astype(np.uint8)
    positions, normals, kinds = decode(sample_surface_points(ball, ball, SPACING_MM))
    assert set(kinds) == {0}
    assert len(positions) > 1000
    middle = (positions.max(axis=0) + positions.min(axis=0)) / 2
    radii = np.linalg.norm(positions - middle, axis=1)
    # Voxels of 5 x 2 x 1 mm must not make an ellipsoid; a slice is thicker than a cell.
    cell = 255 / (150 / VOXEL_MM)
    assert np.ptp(radii) < 3 * cell
    assert np.median(radii) == pytest.approx(50 / VOXEL_MM * cell, rel=0.06)
    outward = (positions - middle) / radii[:, None]
    assert (np.sum(outward * normals, axis=1) > 0.8).mean() > 0.99
    assert np.linalg.norm(normals, axis=1) == pytest.approx(1, abs=0.02)


def test_lesions_are_found_missed_or_false() -> None:
    organ = make_ball((75.0, 75.0, 75.0), 60.0)
    found, missed, false = (
        make_ball((75.0, 75.0, 40.0), 9.0),
        make_ball((75.0, 110.0, 90.0), 9.0),
        make_ball((75.0, 45.0, 95.0), 9.0),
    )
    truth, prediction = organ.astype(np.uint8), organ.astype(np.uint8)
    truth[found | missed] = 2
    prediction[found | false] = 2
    positions, _, kinds = decode(sample_surface_points(prediction, truth, SPACING_MM))
    expected = {"touched": found, "missed": missed, "false": false}
    for name, mask in expected.items():
        mine = positions[kinds == KINDS.index(name)]
        assert len(mine) > 20, name
        centre_zyx = np.argwhere(mask).mean(axis=0) * SPACING_MM
        centre = (centre_zyx[::-1] - 75.0) / 150 * 255
        assert mine.mean(axis=0) == pytest.approx(centre, abs=12), name


def test_a_single_voxel_of_a_lesion_is_shown() -> None:
    truth = make_ball((75.0, 75.0, 75.0), 60.0).astype(np.uint8)
    truth[15, 37, 75] = 2
    _, _, kinds = decode(sample_surface_points(np.zeros_like(truth), truth, SPACING_MM))
    assert (kinds == KINDS.index("missed")).sum() >= 1


def test_the_number_of_points_is_limited_and_reproducible() -> None:
    z, y, x = np.indices(SHAPE)
    sponge = (((z // 2 + y // 4 + x // 8) % 2) + 1).astype(np.uint8)
    first = sample_surface_points(sponge, sponge, SPACING_MM)
    assert first["count"] == MAX_POINTS
    assert first == sample_surface_points(sponge, sponge, SPACING_MM)
    _, _, kinds = decode(first)
    assert (kinds != 0).sum() <= MAX_POINTS // 2


def test_empty_masks_have_no_points_and_a_prediction_alone_has_its_frame() -> None:
    empty = np.zeros(SHAPE, np.uint8)
    assert sample_surface_points(empty, empty, SPACING_MM)["count"] == 0
    ball = make_ball((75.0, 75.0, 75.0), 50.0).astype(np.uint8)
    assert sample_surface_points(ball, empty, SPACING_MM)["count"] > 1000
