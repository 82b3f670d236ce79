"""Random grids for property-based tests: rotated, mirrored, anisotropic, optionally sheared."""

import numpy as np
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from liverseg_dist.volume import Grid, Volume

ALL_ORIENTATIONS = tuple(
    "".join(axes)
    for x in "RL"
    for y in "AP"
    for z in "SI"
    for axes in ((x, y, z), (x, z, y), (y, x, z), (y, z, x), (z, x, y), (z, y, x))
)
"""All 48 orientations of a volume along the axes of the world."""

finite = st.floats(-500, 500, allow_nan=False)
spacings = st.floats(0.3, 6.0, allow_nan=False)
angles = st.floats(-180, 180, allow_nan=False)
counts = st.integers(1, 7)


@st.composite
def grids(draw: st.DrawFn, oblique: bool = True, sheared: bool = False) -> Grid:
    """Axes are permuted, flipped (also negative determinants), rotated, anisotropic and shifted."""
    shape = draw(st.tuples(counts, counts, counts))
    order = draw(st.permutations([0, 1, 2]))
    signs = draw(st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3))
    directions = np.eye(3)[:, order] * signs
    if oblique:
        directions = (
            Rotation.from_euler(
                "xyz", draw(st.tuples(angles, angles, angles)), degrees=True
            ).as_matrix()
            @ directions
        )
    if sheared:
        slant = np.eye(3)
        slant[1, 2] = draw(st.floats(-0.4, 0.4, allow_nan=False))  # gantry tilt
        directions = slant @ directions
    affine = np.eye(4)
    affine[:3, :3] = directions * np.asarray(draw(st.tuples(spacings, spacings, spacings)))
    affine[:3, 3] = draw(st.tuples(finite, finite, finite))
    return Grid(shape, affine)


def numbered(grid: Grid) -> Volume:
    """A volume in which the value of each voxel is its index."""
    return Volume(np.arange(np.prod(grid.shape), dtype=np.int16).reshape(grid.shape), grid)


def locate_values(volume: Volume) -> np.ndarray:
    """World position (n, 3) of the voxel with value n; NaN for missing values."""
    index = np.argwhere(volume.voxels >= 0)
    result = np.full((int(volume.voxels.max(initial=0)) + 1, 3), np.nan)
    result[volume.voxels[tuple(index.T)]] = volume.grid.world_mm(index)
    return result
