"""Rigid registration of one channel of a scan to another: `register_rigid(fixed, moving)`.

For `convert.register_channels=rigid`. The similarity is Mattes' mutual information, which needs no
common units (https://doi.org/10.1109/TMI.2003.809072). The result changes the affine of the moving
channel only, so that its voxels are interpolated once, with all other resampling. Samples are drawn
with a fixed seed on one thread: the same numbers on every machine.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK

from liverseg_dist.data.preprocessing.resample import resample_to_grid
from liverseg_dist.volume import Grid, Volume

COARSE_MM = 3.0
"""Voxel size at which scans are compared."""
HISTOGRAM_BINS = 32
SAMPLED_SHARE = 0.3
SEED = 20
ITERATIONS = 150
CLIP_PERCENTILES = (1.0, 99.0)
MIN_GAIN = 1e-3
"""Mutual information (nats) by which the result must exceed the headers' positions."""


@dataclass(frozen=True)
class RigidAlignment:
    """How a channel was moved, and how well it then fits.

    `matrix` (4, 4) maps world positions (mm, RAS) of the moving channel to those of the fixed one.
    Mutual information is in nats, larger is better.
    """

    matrix: np.ndarray
    mutual_information_before: float
    mutual_information_after: float

    @property
    def is_better(self) -> bool:
        return self.mutual_information_after > self.mutual_information_before + MIN_GAIN

    @property
    def rotation_degrees(self) -> float:
        cosine = (np.trace(self.matrix[:3, :3]) - 1) / 2
        # Rounding can bring the cosine slightly above 1.
        return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))

    def shift_mm(self, grid: Grid) -> float:
        """Distance by which the centre of a grid moves."""
        centre = grid.world_mm((np.asarray(grid.shape) - 1) / 2)
        moved = self.matrix[:3, :3] @ centre + self.matrix[:3, 3]
        return float(np.linalg.norm(moved - centre))

    def to_json(self) -> dict[str, Any]:
        return {
            "method": "rigid",
            "matrix": [[round(float(v), 9) for v in row] for row in self.matrix],
            "rotation_degrees": round(self.rotation_degrees, 3),
            "mutual_information_before": round(self.mutual_information_before, 6),
            "mutual_information_after": round(self.mutual_information_after, 6),
        }


def register_rigid(fixed: Volume, moving: Volume) -> RigidAlignment:
    """Find the rigid movement that brings a channel onto another one.

    Args:
        fixed: The channel that stays; int16, RAS.
        moving: The channel to be moved; int16, RAS.

    Returns:
        The alignment. Callers keep the headers' positions unless it `is_better`.
    """
    # Without contrast there is nothing to compare, and ITK refuses a histogram without a width.
    if _is_constant(fixed) or _is_constant(moving):
        return RigidAlignment(np.eye(4), 0.0, 0.0)
    threads = SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads()
    # With several threads the sums, and so the last bits of the transform, would differ from call to
    # call. The metric has no number of threads of its own.
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        return _align(fixed, _coarse_image(fixed), _coarse_image(moving))
    finally:
        SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


def _is_constant(volume: Volume) -> bool:
    return bool(volume.voxels.min() == volume.voxels.max())


def _align(fixed: Volume, fixed_image: Any, moving_image: Any) -> RigidAlignment:
    transform = SimpleITK.Euler3DTransform()
    # Rotations about the centre of the scan: about the origin, a small angle would be a large
    # shift.
    centre = fixed.grid.world_mm((np.asarray(fixed.shape) - 1) / 2)
    transform.SetCenter([float(v) for v in centre])
    method = _make_method()
    method.SetInitialTransform(transform, inPlace=True)
    # The metric before and after is evaluated on the same images, so both are comparable.
    before = -float(method.MetricEvaluate(fixed_image, moving_image))
    method.Execute(fixed_image, moving_image)
    after = -float(method.MetricEvaluate(fixed_image, moving_image))
    # SimpleITK's transform maps fixed to moving positions; the channel moves the other way.
    to_moving = np.eye(4)
    to_moving[:3, :3] = np.array(transform.GetMatrix()).reshape(3, 3)
    middle, offset = np.array(transform.GetCenter()), np.array(transform.GetTranslation())
    to_moving[:3, 3] = middle + offset - to_moving[:3, :3] @ middle
    # Images without a common structure, such as constant ones, have no finite similarity.
    if not all(map(math.isfinite, (before, after))):
        after = before = 0.0
    return RigidAlignment(np.linalg.inv(to_moving), before, after)


def _make_method() -> Any:
    method = SimpleITK.ImageRegistrationMethod()
    # The same seed for each scan: the result depends on the scan alone.
    method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=HISTOGRAM_BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(SAMPLED_SHARE, SEED)
    method.SetInterpolator(SimpleITK.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=2.0,
        minStep=1e-3,
        numberOfIterations=ITERATIONS,
        relaxationFactor=0.6,
        gradientMagnitudeTolerance=1e-6,
    )
    # Degrees and millimetres have different effects; the scales make a step of each equally large.
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([2.0, 1.0, 0.0])
    # With several threads the sums, and so the last bits of the transform, would differ.
    method.SetNumberOfThreads(1)
    return method


def _coarse_image(volume: Volume) -> Any:
    """The scan at about COARSE_MM as an image of SimpleITK whose physical space is the world (RAS).

    Values are clipped: bone, metal and bright vessels would take most bins of the histogram.
    """
    # Never finer than the scan itself.
    spacing_mm = [max(COARSE_MM, mm) for mm in volume.spacing_mm]
    grid = volume.grid.with_spacing(spacing_mm)
    coarse = resample_to_grid(volume, grid, "image")
    low, high = np.percentile(coarse.voxels, CLIP_PERCENTILES)
    # A constant image must keep a range above 0.
    values = np.clip(coarse.voxels.astype(np.float32), low, max(high, low + 1))
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(values))
    z_mm, y_mm, x_mm = grid.spacing_mm
    image.SetSpacing((x_mm, y_mm, z_mm))
    image.SetOrigin([float(v) for v in grid.affine[:3, 3]])
    # The affine without the voxel sizes is the rotation.
    directions = grid.affine[:3, :3] / np.linalg.norm(grid.affine[:3, :3], axis=0)
    image.SetDirection([float(v) for v in directions.reshape(-1)])
    return image
