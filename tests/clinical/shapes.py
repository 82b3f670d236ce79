"""Ellipsoids of known size on grids of any spacing, the truth for volumes and diameters."""

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from liverseg_dist.volume import Float3, Grid, Volume


@dataclass(frozen=True)
class Ellipsoid:
    """Half-axes in mm and a rotation; the quadratic form is x A x <= 1."""

    half_axes_mm: tuple[float, float, float]
    seed: int = 0

    @property
    def form(self) -> np.ndarray:
        turn = Rotation.random(random_state=self.seed).as_matrix()
        return turn @ np.diag(1.0 / np.square(self.half_axes_mm)) @ turn.T

    @property
    def volume_ml(self) -> float:
        return float(4.0 / 3.0 * np.pi * np.prod(self.half_axes_mm)) / 1000.0

    @property
    def axial_mm(self) -> tuple[float, float]:
        """Long and short axis of the largest axial section, which passes through the centre."""
        small, large = np.linalg.eigvalsh(self.form[:2, :2])
        return float(2 / np.sqrt(small)), float(2 / np.sqrt(large))

    @property
    def longest_mm(self) -> float:
        return 2 * max(self.half_axes_mm)

    def on_grid(self, spacing_mm: Float3, centre_mm: Float3 = (0.0, 0.0, 0.0)) -> Volume:
        """Mask (boolean) with voxels (z, y, x) of this size; `centre_mm` is in world
        coordinates."""
        reach = max(self.half_axes_mm) + max(spacing_mm) + 2
        counts = [int(np.ceil(2 * reach / mm)) for mm in spacing_mm]
        z, y, x = spacing_mm
        affine = np.diag([x, y, z, 1.0])
        affine[:3, 3] = [-(n - 1) / 2 * mm for n, mm in zip(counts[::-1], (x, y, z), strict=True)]
        grid = Grid((counts[0], counts[1], counts[2]), affine)
        return Volume(self.mask(grid, centre_mm), grid)

    def mask(self, grid: Grid, centre_mm: Float3) -> np.ndarray:
        index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)
        position = grid.world_mm(index) - np.array(centre_mm)
        return np.einsum("...i,ij,...j->...", position, self.form, position) <= 1.0


def random_ellipsoids(
    count: int, low_mm: float, high_mm: float
) -> list[tuple[Ellipsoid, np.ndarray]]:
    """Ellipsoids in random directions, each with a random shift of up to half a voxel (in
    voxels)."""
    shapes = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        a, b, c = rng.uniform(low_mm, high_mm, 3)
        shapes.append((Ellipsoid((a, b, c), seed), rng.uniform(-0.5, 0.5, 3)))
    return shapes
