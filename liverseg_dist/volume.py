"""`Grid` and `Volume`: the only home of axis order and of the arithmetic on shapes, spacings and affines.

Arrays are `z, y, x`. An affine is NIfTI's: it maps voxel indices in NIfTI order (x, y, z, 1), which is an array's index
reversed, to millimetres in RAS+ space. Because NIfTI stores x fastest, the `z, y, x` view of a file is its C-contiguous
form. Everything that has to swap the two orders does it here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import nibabel as nib
import numpy as np

CANONICAL_ORIENTATION = "RAS"
"""Orientation (NIfTI order: x to the Right, y to the Anterior, z to the Superior) all work is done in."""

Index3 = tuple[int, int, int]
Float3 = tuple[float, float, float]


@dataclass(frozen=True)
class Grid:
    """Where voxels lie in the world: array shape `(z, y, x)` and the NIfTI affine (4x4, to mm in RAS+)."""

    shape: Index3
    affine: np.ndarray

    def __post_init__(self) -> None:
        affine = np.asarray(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise ValueError("an affine is a finite 4x4 matrix")
        if abs(np.linalg.det(affine[:3, :3])) < 1e-12:
            raise ValueError("the affine is singular: a voxel would have no volume")
        affine = affine.copy()
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Grid)
            and self.shape == other.shape
            and np.array_equal(self.affine, other.affine)
        )

    def __hash__(self) -> int:
        return hash((self.shape, self.affine.tobytes()))

    @cached_property
    def spacing_mm(self) -> Float3:
        """Voxel size (z, y, x) in mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)

    @cached_property
    def voxel_volume_ml(self) -> float:
        """Volume of one voxel in ml (1000 mm^3); exact for sheared affines too."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    @cached_property
    def orientation(self) -> str:
        """Axis codes in NIfTI order (x, y, z), nearest for an oblique scan, e.g. `LPS`."""
        return "".join(nib.orientations.aff2axcodes(self.affine))

    @cached_property
    def is_sheared(self) -> bool:
        """Whether the axes are not at right angles (to about 0.06 degrees)."""
        directions = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        return bool(np.abs(directions.T @ directions - np.eye(3)).max() > 1e-3)

    def world_mm(self, index_zyx: np.ndarray) -> np.ndarray:
        """World position (x, y, z in mm, RAS+) of voxel indices `(..., 3)` given as z, y, x (may be fractional)."""
        index_xyz = np.asarray(index_zyx, dtype=np.float64)[..., ::-1]
        return index_xyz @ self.affine[:3, :3].T + self.affine[:3, 3]

    def index_of(self, world_mm: np.ndarray) -> np.ndarray:
        """Fractional voxel index (z, y, x) of world positions `(..., 3)`; inverse of `world_mm`."""
        inverse = np.linalg.inv(self.affine)
        return (np.asarray(world_mm, dtype=np.float64) @ inverse[:3, :3].T + inverse[:3, 3])[
            ..., ::-1
        ]

    def corners_mm(self) -> np.ndarray:
        """World positions (8, 3) of the centres of the corner voxels."""
        ends = [(0, n - 1) for n in self.shape]
        return self.world_mm(np.array(np.meshgrid(*ends, indexing="ij")).reshape(3, -1).T)

    def matches(self, other: "Grid", tolerance_mm: float = 0.1) -> bool:
        """Same shape, and no corner voxel further apart than `tolerance_mm`."""
        return self.shape == other.shape and bool(
            np.abs(self.corners_mm() - other.corners_mm()).max() <= tolerance_mm
        )

    def cropped(self, start: Sequence[int], shape: Sequence[int]) -> "Grid":
        """The grid of a box that starts at voxel `start` (may be negative: padding) and has `shape`; z, y, x."""
        affine = self.affine.copy()
        affine[:3, 3] = self.world_mm(np.asarray(start))
        return Grid(_to_index3(shape), affine)

    def with_spacing(
        self, spacing_mm: Sequence[float], shape: Sequence[int] | None = None
    ) -> "Grid":
        """The grid over the same field of view with other voxel sizes (z, y, x).

        Outer faces coincide (not voxel centres), as in ITK and scikit-image; `shape` defaults to the nearest count,
        and the spacing is then adapted so that the field of view is kept exactly.
        """
        wanted = np.asarray(spacing_mm, dtype=np.float64)
        extent = np.asarray(self.shape) * np.asarray(self.spacing_mm)
        if shape is None:
            shape = np.maximum(1, np.round(extent / wanted)).astype(int).tolist()
        step = np.asarray(self.shape, dtype=np.float64) / np.asarray(shape)
        affine = self.affine.copy()
        affine[:3, :3] = self.affine[:3, :3] * step[::-1]
        affine[:3, 3] = self.world_mm((step - 1) / 2)
        return Grid(_to_index3(shape), affine)

    def to_json(self) -> dict[str, object]:
        return {"shape_zyx": list(self.shape), "affine": self.affine.tolist()}

    @classmethod
    def from_json(cls, data: dict) -> "Grid":
        return cls(_to_index3(data["shape_zyx"]), np.array(data["affine"], dtype=np.float64))


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels `(z, y, x)` and the grid they lie on."""

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
        """The same voxels at the same places in the world, with axes permuted and flipped (a view) to `orientation`."""
        grid, axes, flips = plan_reorientation(self.grid, orientation)
        voxels = self.voxels.transpose(axes)
        return Volume(voxels[tuple(slice(None, None, -1 if flip else 1) for flip in flips)], grid)

    def cropped(self, start: Sequence[int], shape: Sequence[int], fill: float = 0) -> "Volume":
        """The box at `start` with `shape`; what lies outside the volume is `fill`."""
        grid = self.grid.cropped(start, shape)
        first = np.asarray(start)
        low, high = np.maximum(first, 0), np.minimum(first + np.asarray(shape), self.shape)
        if (low == first).all() and (high == first + np.asarray(shape)).all():
            return Volume(self.voxels[tuple(map(slice, low, high))], grid)
        voxels = np.full(grid.shape, fill, dtype=self.voxels.dtype)
        if (high > low).all():
            voxels[tuple(map(slice, low - first, high - first))] = self.voxels[
                tuple(map(slice, low, high))
            ]
        return Volume(voxels, grid)


def plan_reorientation(
    grid: Grid, orientation: str
) -> tuple[Grid, Index3, tuple[bool, bool, bool]]:
    """How to bring `grid` to `orientation`: (new grid, array axes to transpose by, which new axes to flip)."""
    source = nib.orientations.io_orientation(grid.affine)
    target = nib.orientations.axcodes2ornt(tuple(orientation))
    change = nib.orientations.ornt_transform(
        source, target
    )  # row i: where input axis i (NIfTI order) goes, and its sign
    axes_xyz = [0, 0, 0]
    flips_xyz = [False, False, False]
    for input_axis, (output_axis, sign) in enumerate(change):
        axes_xyz[int(output_axis)] = input_axis
        flips_xyz[int(output_axis)] = sign < 0
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
