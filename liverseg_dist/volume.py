"""`Grid` and `Volume`: axis order, and arithmetic on shapes, spacings and affines.

Arrays are `z, y, x`. An affine is NIfTI's: it maps voxel indices in NIfTI order (x, y, z, 1), the
reverse of an array index, to millimetres in RAS+ space. NIfTI stores x fastest, so the `z, y, x`
view of a file is C-contiguous. The two orders are converted in this module only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import nibabel as nib
import numpy as np

CANONICAL_ORIENTATION = "RAS"
"""Orientation of all processed volumes (NIfTI order): x to the Right, y to the Anterior, z to the
Superior."""

MIN_DETERMINANT = 1e-12
SHEAR_TOLERANCE = 1e-3
"""Largest cosine between two axes that count as perpendicular."""

Index3 = tuple[int, int, int]
Float3 = tuple[float, float, float]


@dataclass(frozen=True)
class Grid:
    """Positions of voxels: array shape `(z, y, x)` and NIfTI affine (4x4, to mm in RAS+)."""

    shape: Index3
    affine: np.ndarray

    def __post_init__(self) -> None:
        affine = np.asarray(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise ValueError("an affine is a finite 4x4 matrix")
        if abs(np.linalg.det(affine[:3, :3])) < MIN_DETERMINANT:
            raise ValueError("the affine is singular: a voxel would have no volume")
        # A private read-only copy: grids are compared and hashed by their values.
        affine = affine.copy()
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Grid):
            return False
        return self.shape == other.shape and np.array_equal(self.affine, other.affine)

    def __hash__(self) -> int:
        return hash((self.shape, self.affine.tobytes()))

    @cached_property
    def spacing_mm(self) -> Float3:
        """Voxel size (z, y, x) in mm."""
        # Columns of the affine are the steps along x, y and z.
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)

    @cached_property
    def voxel_volume_ml(self) -> float:
        """Volume of one voxel in ml (1000 mm^3); exact for sheared affines too."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    @cached_property
    def orientation(self) -> str:
        """Axis codes in NIfTI order (x, y, z), e.g. `LPS`; the nearest ones for an oblique scan."""
        return "".join(nib.orientations.aff2axcodes(self.affine))

    @cached_property
    def is_sheared(self) -> bool:
        """Whether the axes are not at right angles (to about 0.06 degrees)."""
        directions = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        cosines = directions.T @ directions
        return bool(np.abs(cosines - np.eye(3)).max() > SHEAR_TOLERANCE)

    def world_mm(self, index_zyx: np.ndarray) -> np.ndarray:
        """World positions (x, y, z in mm, RAS+) of voxel indices.

        Args:
            index_zyx: `(..., 3)`, may be fractional.
        """
        index_xyz = np.asarray(index_zyx, dtype=np.float64)[..., ::-1]
        return index_xyz @ self.affine[:3, :3].T + self.affine[:3, 3]

    def index_of(self, world_mm: np.ndarray) -> np.ndarray:
        """Fractional voxel index (z, y, x) of world positions `(..., 3)`; inverse of `world_mm`."""
        inverse = np.linalg.inv(self.affine)
        positions = np.asarray(world_mm, dtype=np.float64)
        index_xyz = positions @ inverse[:3, :3].T + inverse[:3, 3]
        return index_xyz[..., ::-1]

    def corners_mm(self) -> np.ndarray:
        """World positions (8, 3) of the centres of the corner voxels."""
        ends = [(0, n - 1) for n in self.shape]
        corners_zyx = np.array(np.meshgrid(*ends, indexing="ij")).reshape(3, -1).T
        return self.world_mm(corners_zyx)

    def matches(self, other: "Grid", tolerance_mm: float = 0.1) -> bool:
        """Whether shapes are equal and corner coordinates differ by at most `tolerance_mm`."""
        if self.shape != other.shape:
            return False
        difference_mm = np.abs(self.corners_mm() - other.corners_mm())
        return bool(difference_mm.max() <= tolerance_mm)

    def cropped(self, start: Sequence[int], shape: Sequence[int]) -> "Grid":
        """The grid of a box.

        Args:
            start: First voxel (z, y, x); may be negative (padding).
            shape: Number of voxels (z, y, x).
        """
        affine = self.affine.copy()
        affine[:3, 3] = self.world_mm(np.asarray(start))
        return Grid(_to_index3(shape), affine)

    def with_spacing(
        self, spacing_mm: Sequence[float], shape: Sequence[int] | None = None
    ) -> "Grid":
        """The grid over the same field of view with other voxel sizes (z, y, x).

        Outer faces coincide (not voxel centres), as in ITK and scikit-image.

        Args:
            spacing_mm: Wanted voxel size. It is adapted so that a whole number of voxels fills the
                field of view exactly.
            shape: Number of voxels; None: the number nearest to the wanted size.
        """
        if shape is None:
            extent_mm = np.asarray(self.shape) * np.asarray(self.spacing_mm)
            counts = np.round(extent_mm / np.asarray(spacing_mm, dtype=np.float64))
            shape = np.maximum(1, counts).astype(int).tolist()
        # Exact steps: the field of view is divided by the number of voxels.
        step = np.asarray(self.shape, dtype=np.float64) / np.asarray(shape)
        affine = self.affine.copy()
        affine[:3, :3] = self.affine[:3, :3] * step[::-1]
        # The centre of the new first voxel, whose outer faces are those of the old one.
        affine[:3, 3] = self.world_mm((step - 1) / 2)
        return Grid(_to_index3(shape), affine)

    def to_json(self) -> dict[str, object]:
        return {"shape_zyx": list(self.shape), "affine": self.affine.tolist()}

    @classmethod
    def from_json(cls, data: dict) -> "Grid":
        return cls(_to_index3(data["shape_zyx"]), np.array(data["affine"], dtype=np.float64))


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels `(z, y, x)` and their grid."""

    voxels: np.ndarray
    grid: Grid

    def __post_init__(self) -> None:
        if self.voxels.shape != self.grid.shape:
            raise ValueError(f"voxels have shape {self.voxels.shape}, their grid {self.grid.shape}")

    @property
    def shape(self) -> Index3:
        return self.grid.shape

    @property
    def spacing_mm(self) -> Float3:
        return self.grid.spacing_mm

    @property
    def affine(self) -> np.ndarray:
        return self.grid.affine

    def with_voxels(self, voxels: np.ndarray) -> "Volume":
        return Volume(voxels, self.grid)

    def reoriented(self, orientation: str = CANONICAL_ORIENTATION) -> "Volume":
        """A view of the voxels with axes permuted and flipped; positions in the world stay."""
        grid, axes, flips = plan_reorientation(self.grid, orientation)
        steps = tuple(slice(None, None, -1 if flip else 1) for flip in flips)
        return Volume(self.voxels.transpose(axes)[steps], grid)

    def cropped(self, start: Sequence[int], shape: Sequence[int], fill: float = 0) -> "Volume":
        """The box at `start` with `shape`; voxels outside the volume are `fill`.

        Returns:
            A view if the box is inside the volume, else a copy.
        """
        grid = self.grid.cropped(start, shape)
        first = np.asarray(start)
        end = first + np.asarray(shape)
        low, high = np.maximum(first, 0), np.minimum(end, self.shape)
        inside = tuple(map(slice, low, high))
        if (low == first).all() and (high == end).all():
            return Volume(self.voxels[inside], grid)
        voxels = np.full(grid.shape, fill, dtype=self.voxels.dtype)
        if (high > low).all():
            voxels[tuple(map(slice, low - first, high - first))] = self.voxels[inside]
        return Volume(voxels, grid)


def plan_reorientation(
    grid: Grid, orientation: str
) -> tuple[Grid, Index3, tuple[bool, bool, bool]]:
    """Plan the axis permutation and flips that bring a grid to an orientation.

    Args:
        grid: Any orientation.
        orientation: Axis codes in NIfTI order, e.g. `RAS`.

    Returns:
        New grid, array axes for `transpose`, and for each new array axis whether it is flipped.
    """
    source = nib.orientations.io_orientation(grid.affine)
    target = nib.orientations.axcodes2ornt(tuple(orientation))
    # Row i: the new position of input axis i (NIfTI order), and its sign.
    change = nib.orientations.ornt_transform(source, target)
    axes_xyz = [0, 0, 0]
    flips_xyz = [False, False, False]
    for input_axis, (output_axis, sign) in enumerate(change):
        axes_xyz[int(output_axis)] = input_axis
        flips_xyz[int(output_axis)] = sign < 0
    # NIfTI axis i is array axis 2 - i.
    axes = _to_index3(2 - axis for axis in reversed(axes_xyz))
    flip_z, flip_y, flip_x = reversed(flips_xyz)
    shape_xyz = grid.shape[::-1]
    affine = grid.affine @ nib.orientations.inv_ornt_aff(change, shape_xyz)
    return (
        Grid(_to_index3(grid.shape[axis] for axis in axes), affine),
        axes,
        (flip_z, flip_y, flip_x),
    )


def _to_index3(values: Iterable[int]) -> Index3:
    z, y, x = (int(v) for v in values)
    return z, y, x
