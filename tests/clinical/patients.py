"""A patient at two dates: an organ with lesions, moved by a known rigid motion and a smooth
deformation."""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

from liverseg_dist.volume import Grid, Volume

Ball = tuple[float, float, float, float]
"""x, y, z and radius in mm, in the baseline's space."""
BASELINE = Grid(
    (52, 60, 64), np.array([[2.5, 0, 0, -80], [0, 2.5, 0, -75], [0, 0, 2.5, -65], [0, 0, 0, 1.0]])
)
FOLLOW_UP = Grid(
    (32, 68, 72), np.array([[2.3, 0, 0, -70], [0, 2.3, 0, -90], [0, 0, 4.0, -55], [0, 0, 0, 1.0]])
)


@dataclass(frozen=True)
class Motion:
    """Follow-up position -> baseline position: a deformation of a few mm after a rigid motion."""

    degrees: float = 5.0
    shift_mm: tuple[float, float, float] = (6.0, -8.0, 7.0)
    wave_mm: float = 4.0

    def to_baseline(self, points_mm: np.ndarray) -> np.ndarray:
        turn = Rotation.from_euler("zx", [self.degrees, self.degrees / 2], degrees=True).as_matrix()
        rigid = (points_mm - self.shift_mm) @ turn
        return rigid + self.wave_mm * np.sin(rigid[..., [1, 2, 0]] / 28.0 + [0.3, 1.0, 2.0])

    def to_follow_up(self, points_mm: np.ndarray) -> np.ndarray:
        """The inverse, by iteration."""
        found = np.array(points_mm, dtype=float)
        for _ in range(200):
            found = found - 0.6 * (self.to_baseline(found) - points_mm)
        return found


STILL = Motion(0.0, (0.0, 0.0, 0.0), 0.0)
_NOISE = gaussian_filter(np.random.default_rng(0).normal(size=(60, 60, 60)), 1.6)
_NOISE /= _NOISE.std()


def paint_patient(
    grid: Grid,
    motion: Motion,
    balls: list[Ball],
    shape: tuple[float, float, float] = (56.0, 44.0, 40.0),
) -> tuple[Volume, Volume]:
    """(mask, image) of the patient on a grid: organ 1 with lesions 2; texture fixed to the
    baseline's space."""
    points = grid.world_mm(np.stack(np.indices(grid.shape), axis=-1))
    at_baseline = motion.to_baseline(points.reshape(-1, 3))
    x, y, z = at_baseline.T
    a, b, c = shape
    # A lobe makes the organ unlike an ellipsoid, which could turn in itself.
    body = (x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2 <= 1
    lobe = ((x + 40) / 30) ** 2 + ((y - 15) / 22) ** 2 + ((z - 8) / 20) ** 2 <= 1
    organ = body | lobe
    label = organ.astype(np.uint8)
    for bx, by, bz, radius in balls:
        label[organ & ((x - bx) ** 2 + (y - by) ** 2 + (z - bz) ** 2 <= radius**2)] = 2
    texture = map_coordinates(_NOISE, (at_baseline / 2.5 + 30).T, order=1, mode="wrap")
    image = np.where(organ, 110 + 20 * texture, -60.0)
    image[label == 2] = 60
    mask = Volume(label.reshape(grid.shape), grid)
    return mask, Volume(image.reshape(grid.shape).astype(np.int16), grid)
