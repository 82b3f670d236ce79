"""Registration against a known motion: error at points of the organ, inverse, folding, stated
quality."""

import numpy as np
import pytest

from liverseg_dist.clinical.registration import (
    OrganScan,
    Registration,
    identity_registration,
    jacobian_determinants,
    register_organs,
)
from liverseg_dist.clinical.registration_backends import choose_backend
from liverseg_dist.volume import Volume
from tests.clinical.patients import BASELINE, FOLLOW_UP, STILL, Motion, paint_patient

LESIONS = [(20.0, 5.0, 10.0, 7.0), (-20.0, -10.0, -5.0, 9.0)]
GROWN = [(20.0, 5.0, 10.0, 11.0), (-20.0, -10.0, -5.0, 5.0)]


def scan_of(mask: Volume, image: Volume | None) -> OrganScan:
    return OrganScan(Volume(mask.voxels > 0, mask.grid), mask.voxels == 2, image)


def register(backend: str, with_images: bool) -> tuple[Registration, np.ndarray]:
    """(registration, errors in mm at points of the organ that are no lesion)."""
    first, first_image = paint_patient(BASELINE, STILL, LESIONS)
    second, second_image = paint_patient(FOLLOW_UP, Motion(), GROWN)
    name, deform = choose_backend(backend)  # type: ignore[arg-type]
    registration = register_organs(
        scan_of(first, first_image if with_images else None),
        scan_of(second, second_image if with_images else None),
        deform,
        name,
    )
    organ = np.argwhere(first.voxels == 1)[::37]
    points = BASELINE.world_mm(organ)
    errors = np.linalg.norm(registration.to_moving(points) - Motion().to_follow_up(points), axis=1)
    return registration, errors


@pytest.mark.parametrize(
    ("backend", "with_images", "mean_mm"),
    [("greedy", True, 2.0), ("demons", True, 3.0), ("greedy", False, 4.5)],
)
def test_against_a_known_motion(backend: str, with_images: bool, mean_mm: float) -> None:
    registration, errors = register(backend, with_images)
    quality = registration.quality
    assert errors.mean() <= mean_mm
    assert quality.rigid_dice >= 0.85
    assert quality.dice >= max(0.93, quality.rigid_dice)
    assert quality.folding == 0.0
    assert quality.surface_mm <= 2.0
    assert quality.volume_ratio == pytest.approx(1.0, abs=0.08)
    assert (quality.similarity is not None) == with_images
    points = registration.to_moving(np.array([[10.0, 5.0, 0.0], [-20.0, 0.0, 10.0]]))
    assert registration.to_moving(registration.to_fixed(points)) == pytest.approx(points, abs=0.2)


def test_a_fold_is_seen() -> None:
    displacement = np.zeros((8, 8, 8, 3))
    displacement[..., 0] = -2.0 * np.arange(8)  # x -> -x: a mirror
    assert (jacobian_determinants(displacement, (1.0, 1.0, 1.0)) < 0).all()
    assert jacobian_determinants(np.zeros((4, 4, 4, 3)), (1.0, 2.0, 3.0)) == pytest.approx(
        np.ones((4, 4, 4))
    )


def test_the_baseline_maps_to_itself() -> None:
    points = np.array([[3.0, -4.0, 5.0], [200.0, 10.0, -30.0]])
    registration = identity_registration(BASELINE)
    assert registration.to_moving(points) == pytest.approx(points)
    assert registration.to_fixed(points) == pytest.approx(points)
