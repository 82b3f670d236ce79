"""Registration of an organ between two scans: rigid by its shape and texture, then deformable.

Both scans are brought to one coarse grid around the organ. Two channels drive the registration: the
signed distance to the organ's surface, which works without images and across contrast phases, and
the organ's texture where images are given. Lesions are filled with the organ's median first: a
lesion that grows must not be pressed back to its old size.

The deformable step is a back-end (`registration_backends`). The result maps points of the fixed
scan to the moving one, p -> R(p + u(p)), and states its quality: overlap of the organs, distance of
their surfaces, folding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates
from scipy.spatial import cKDTree

from liverseg_dist.clinical.components import bounding_box
from liverseg_dist.clinical.surface_points import inner_face_points
from liverseg_dist.volume import Grid, Volume

SPACING_MM = 3.0
MARGIN_MM = 20.0
DISTANCE_LIMIT_MM = 15.0
TEXTURE_LIMIT = 2.0
TEXTURE_SMOOTHING_VOXELS = 0.7
"""Against noise, which would be registered as if it were texture."""
INVERSE_STEPS = 25
INVERSE_TOLERANCE_MM = 0.02
Channels = tuple[np.ndarray, ...]
Deformer = Callable[[Channels, Channels, Grid], np.ndarray]
"""(fixed channels, moving channels on the fixed grid, that grid) -> displacement (z, y, x, 3) in
mm, world axes."""


@dataclass(frozen=True)
class OrganScan:
    """What a registration is given of one scan.

    Attributes:
        organ: Boolean mask of the organ with its lesions.
        lesions: Boolean mask of the lesions, on the same grid.
        image: The scan on that grid, or None.
    """

    organ: Volume
    lesions: np.ndarray
    image: Volume | None = None


@dataclass(frozen=True)
class RegistrationQuality:
    """How well a registration fits; none of it needs landmarks.

    Attributes:
        rigid_dice: Overlap of the organs after the rigid step.
        dice: Overlap after the deformable step.
        surface_mm: Mean distance of the registered organ's surface to the fixed one.
        surface_p95_mm: 95th percentile of that distance.
        folding: Share of the organ's voxels whose Jacobian determinant is not positive.
        mean_displacement_mm: Of the deformable step, within the organ.
        volume_ratio: Organ volume of the moving scan over that of the fixed one.
        rigid_similarity: Correlation of the organs' textures after the rigid step, None without
            images.
        similarity: The same after registration.
        backend: Name of the deformable back-end.
    """

    rigid_dice: float
    dice: float
    surface_mm: float
    surface_p95_mm: float
    folding: float
    mean_displacement_mm: float
    volume_ratio: float
    rigid_similarity: float | None
    similarity: float | None
    backend: str


@dataclass(frozen=True)
class Registration:
    """A mapping from the fixed scan's space to the moving one's, in mm (RAS+).

    Attributes:
        rigid: Matrix (4, 4) that takes fixed to moving positions.
        displacement: Vectors (z, y, x, 3) in mm on `grid`, added before the rigid step.
        grid: Grid of the displacement, in the fixed scan's space.
        quality: How well it fits.
    """

    rigid: np.ndarray
    displacement: np.ndarray
    grid: Grid
    quality: RegistrationQuality

    def to_moving(self, points_mm: np.ndarray) -> np.ndarray:
        """Positions (n, 3) of the fixed scan in the moving one."""
        return _apply(self.rigid, points_mm + self._displacement_at(points_mm))

    def to_fixed(self, points_mm: np.ndarray) -> np.ndarray:
        """Positions (n, 3) of the moving scan in the fixed one, by fixed-point iteration."""
        target = _apply(np.linalg.inv(self.rigid), points_mm)
        found = target.copy()
        for _ in range(INVERSE_STEPS):
            following = target - self._displacement_at(found)
            step = float(np.abs(following - found).max(initial=0.0))
            # Half steps converge where the displacement is steep, too.
            found = 0.5 * (found + following)
            if step < INVERSE_TOLERANCE_MM:
                break
        return found

    def _displacement_at(self, points_mm: np.ndarray) -> np.ndarray:
        index = self.grid.index_of(points_mm).T
        parts = []
        for axis in range(3):
            parts.append(
                map_coordinates(self.displacement[..., axis], index, order=1, mode="nearest")
            )
        return np.stack(parts, axis=-1)


def identity_registration(grid: Grid) -> Registration:
    """The mapping of a scan to itself."""
    quality = RegistrationQuality(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, None, None, "identity")
    # The smallest grid that interpolation accepts: the displacement is 0 everywhere.
    small = grid.with_spacing((50.0, 50.0, 50.0), shape=(2, 2, 2))
    return Registration(np.eye(4), np.zeros((2, 2, 2, 3)), small, quality)


def register_organs(
    fixed: OrganScan, moving: OrganScan, deform: Deformer, backend: str
) -> Registration:
    """Register the organ of two scans: rigid, then deformable.

    Args:
        fixed: The scan whose space is kept, such as the baseline.
        moving: The other scan.
        deform: The deformable step.
        backend: Its name, for the record.

    Raises:
        ValueError: An organ is empty.
    """
    grid = working_grid(fixed.organ)
    moving_grid = working_grid(moving.organ)
    uses_image = fixed.image is not None and moving.image is not None
    fixed_channels = make_channels(fixed, grid, uses_image)
    moving_channels = make_channels(moving, moving_grid, uses_image)
    seen, moving_seen = find_coverage(fixed, grid), find_coverage(moving, moving_grid)
    rigid = find_rigid(fixed_channels, grid, seen, moving_channels, moving_grid, moving_seen)
    points = grid.world_mm(_all_indices(grid))
    at_moving = moving_grid.index_of(_apply(rigid, points)).T
    aligned = tuple(_sample(channel, at_moving, grid.shape) for channel in moving_channels)
    # Beyond the end of a scan nothing is known: the fit is judged where both show the patient.
    both = seen & (_sample(moving_seen.astype(np.float32), at_moving, grid.shape) >= 0.5)
    displacement = deform(fixed_channels, aligned, grid)
    return Registration(
        rigid,
        displacement,
        grid,
        _measure_quality(fixed, moving, fixed_channels, aligned, both, displacement, grid, backend),
    )


def working_grid(organ: Volume) -> Grid:
    """An isotropic grid of `SPACING_MM` along the patient's axes around an organ, with a margin.

    Raises:
        ValueError: The organ is empty.
    """
    box = bounding_box(organ.voxels)
    if box is None:
        raise ValueError("the organ is empty")
    corners = organ.grid.cropped(
        [axis.start for axis in box], [axis.stop - axis.start for axis in box]
    ).corners_mm()
    low, high = corners.min(axis=0) - MARGIN_MM, corners.max(axis=0) + MARGIN_MM
    counts = np.ceil((high - low) / SPACING_MM).astype(int) + 1
    # Along the axes of the patient, so that both scans have the same directions.
    affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])
    affine[:3, 3] = low
    return Grid((int(counts[2]), int(counts[1]), int(counts[0])), affine)


def make_channels(scan: OrganScan, grid: Grid, uses_image: bool) -> Channels:
    """The organ's shape (-1 outside to 1 inside), and its texture (0 outside and in lesions)."""
    # The distance is computed on the isotropic grid: on thick slices it would have steps.
    index = scan.organ.grid.index_of(grid.world_mm(_all_indices(grid))).T
    organ = _sample(scan.organ.voxels.astype(np.float32), index, grid.shape) >= 0.5
    inside = distance_transform_edt(organ, sampling=SPACING_MM)
    outside = distance_transform_edt(~organ, sampling=SPACING_MM)
    shape = np.clip(inside - outside, -DISTANCE_LIMIT_MM, DISTANCE_LIMIT_MM) / DISTANCE_LIMIT_MM
    if not uses_image:
        return (shape.astype(np.float32),)
    assert scan.image is not None
    healthy = scan.organ.voxels & ~scan.lesions
    # A liver full of tumour has no healthy voxel; then the whole organ gives the scale.
    values = scan.image.voxels[healthy] if healthy.any() else scan.image.voxels[scan.organ.voxels]
    # Percentiles instead of the extremes: metal and air must not set the scale.
    p10, median, p90 = np.percentile(values.astype(np.float32), (10, 50, 90))
    scale = max(float(p90 - p10), 1e-3)
    texture = (scan.image.voxels.astype(np.float32) - median) / scale
    # 0 is the median: a lesion that grows must not drive the registration.
    texture[~healthy] = 0.0
    sampled = gaussian_filter(_sample(texture, index, grid.shape), TEXTURE_SMOOTHING_VOXELS)
    return shape.astype(np.float32), np.clip(sampled, -TEXTURE_LIMIT, TEXTURE_LIMIT)


def find_coverage(scan: OrganScan, grid: Grid) -> np.ndarray:
    """Which voxels of a working grid lie inside the scan."""
    index = scan.organ.grid.index_of(grid.world_mm(_all_indices(grid)))
    inside = ((index >= -0.5) & (index <= np.array(scan.organ.shape) - 0.5)).all(axis=1)
    return inside.reshape(grid.shape)


def find_rigid(
    fixed: Channels,
    fixed_grid: Grid,
    fixed_seen: np.ndarray,
    moving: Channels,
    moving_grid: Grid,
    moving_seen: np.ndarray,
) -> np.ndarray:
    """The rigid matrix (4, 4) from fixed to moving positions that brings the organs together.

    Mean squares of the channels' sum, from the organs' centres, coarse to fine.
    """
    fixed_image = to_itk(_combined(fixed), fixed_grid)
    moving_image = to_itk(_combined(moving), moving_grid)
    start = SimpleITK.Euler3DTransform()
    centre = _organ_centre(fixed[0], fixed_grid)
    # A rotation about the organ: about the origin it would also shift the organ far.
    start.SetCenter([float(v) for v in centre])
    shift = _organ_centre(moving[0], moving_grid) - centre
    start.SetTranslation([float(v) for v in shift])
    method = SimpleITK.ImageRegistrationMethod()
    method.SetMetricAsMeanSquares()
    # No sampling: the same figures on every machine.
    method.SetMetricSamplingStrategy(method.NONE)
    method.SetInterpolator(SimpleITK.sitkLinear)
    # Far from the organ the clipped distance is constant and only adds computing time.
    near = (fixed[0] > -0.6) & fixed_seen
    method.SetMetricFixedMask(to_itk(near.astype(np.uint8), fixed_grid))
    method.SetMetricMovingMask(to_itk(moving_seen.astype(np.uint8), moving_grid))
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=2.0, minStep=1e-3, numberOfIterations=120, relaxationFactor=0.6
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([3, 1])
    method.SetSmoothingSigmasPerLevel([1.0, 0.0])
    # Sums of several threads depend on their order.
    method.SetNumberOfThreads(1)
    method.SetInitialTransform(start, inPlace=True)
    method.Execute(fixed_image, moving_image)
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(start.GetMatrix()).reshape(3, 3)
    # ITK rotates about the centre: p -> R(p - c) + c + t.
    middle, offset = np.array(start.GetCenter()), np.array(start.GetTranslation())
    matrix[:3, 3] = middle + offset - matrix[:3, :3] @ middle
    return matrix


def to_itk(voxels: np.ndarray, grid: Grid) -> Any:
    """A SimpleITK image whose physical space is the grid's world; axes keep their names (RAS as
    they are)."""
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(voxels))
    z, y, x = grid.spacing_mm
    image.SetSpacing((x, y, z))
    image.SetOrigin([float(v) for v in grid.affine[:3, 3]])
    return image


def jacobian_determinants(displacement: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Determinant of the derivative of p + u(p) at each voxel; not positive where the mapping
    folds."""
    derivative = np.empty((*displacement.shape[:3], 3, 3))
    for component in range(3):
        # numpy orders derivatives z, y, x; the displacement has x, y, z.
        by_zyx = np.gradient(displacement[..., component], *spacing_mm)
        derivative[..., component, :] = np.stack(by_zyx[::-1], axis=-1)
    return np.linalg.det(derivative + np.eye(3))


def _measure_quality(
    fixed: OrganScan,
    moving: OrganScan,
    fixed_channels: Channels,
    aligned: Channels,
    both: np.ndarray,
    displacement: np.ndarray,
    grid: Grid,
    backend: str,
) -> RegistrationQuality:
    index = _all_indices(grid)
    moved = grid.index_of(grid.world_mm(index) + displacement.reshape(-1, 3)).T
    warped = tuple(_sample(channel, moved, grid.shape) for channel in aligned)
    organ, registered = both & (fixed_channels[0] > 0), both & (warped[0] > 0)
    distances = _surface_distances(registered, organ, grid)
    similarity, rigid_similarity = None, None
    if len(warped) > 1:
        # Only where both organs are: elsewhere the texture is padding.
        shared = organ & registered
        similarity = _correlation(fixed_channels[1][shared], warped[1][shared])
        shared = organ & (aligned[0] > 0)
        rigid_similarity = _correlation(fixed_channels[1][shared], aligned[1][shared])
    jacobian = jacobian_determinants(displacement, grid.spacing_mm)
    volumes = [
        int(scan.organ.voxels.sum()) * scan.organ.grid.voxel_volume_ml for scan in (fixed, moving)
    ]
    return RegistrationQuality(
        rigid_dice=_dice(organ, both & (aligned[0] > 0)),
        dice=_dice(organ, registered),
        surface_mm=float(distances.mean()) if distances.size else float("inf"),
        surface_p95_mm=float(np.percentile(distances, 95)) if distances.size else float("inf"),
        folding=float((jacobian[organ] <= 0).mean()),
        mean_displacement_mm=float(np.linalg.norm(displacement[organ], axis=-1).mean()),
        volume_ratio=volumes[1] / volumes[0],
        rigid_similarity=rigid_similarity,
        similarity=similarity,
        backend=backend,
    )


def _surface_distances(one: np.ndarray, other: np.ndarray, grid: Grid) -> np.ndarray:
    points, target = inner_face_points(one), inner_face_points(other)
    if not len(points) or not len(target):
        return np.empty(0)
    distances, _ = cKDTree(grid.world_mm(target)).query(grid.world_mm(points))
    return distances


def _combined(channels: Channels) -> np.ndarray:
    """Shape decides, texture refines."""
    return channels[0] if len(channels) == 1 else channels[0] + 0.25 * channels[1]


def _organ_centre(shape: np.ndarray, grid: Grid) -> np.ndarray:
    return grid.world_mm(np.argwhere(shape > 0).mean(axis=0))


def _dice(one: np.ndarray, other: np.ndarray) -> float:
    total = int(one.sum()) + int(other.sum())
    return 2.0 * int((one & other).sum()) / total if total else 0.0


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    # A constant texture has no correlation; numpy would warn and return NaN.
    if one.size < 2 or one.std() < 1e-6 or other.std() < 1e-6:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def _all_indices(grid: Grid) -> np.ndarray:
    return np.indices(grid.shape).reshape(3, -1).T


def _sample(voxels: np.ndarray, index: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Linear interpolation at indices (3, n); outside, the nearest voxel's value."""
    return map_coordinates(voxels, index, order=1, mode="nearest").reshape(shape).astype(np.float32)


def _apply(matrix: np.ndarray, points_mm: np.ndarray) -> np.ndarray:
    return points_mm @ matrix[:3, :3].T + matrix[:3, 3]
