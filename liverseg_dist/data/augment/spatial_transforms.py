"""Rotation, scaling, elastic deformation and mirroring: settings and drawn parameters.

Probabilities and ranges of the preset `nnunet` are nnU-Net's (see `presets`). The resampling is in
`spatial_resampling`.
"""

import math
from dataclasses import dataclass

import numpy as np

from liverseg_dist.data.augment.host_tables import TableKey
from liverseg_dist.data.augment.spatial_resampling import (
    SpatialDraw,
    list_resampling_tables,
    resample_patch,
)
from liverseg_dist.data.augment.transform import Range, Sample, SampleContext, Transform
from liverseg_dist.data.counter_random import CounterRandom
from liverseg_dist.volume import Float3, Index3

_ELASTIC_STREAM = 17
"""Purpose of the random stream of control points, whose number depends on the patch size."""


@dataclass(frozen=True)
class SpatialTransform(Transform):
    """Rotation, scaling and elastic deformation in one interpolation."""

    p_rotation: float = 0.0
    rotation_degrees: float = 30.0
    """Largest angle about each axis; anisotropic patches are rotated in plane by up to 180."""
    p_scaling: float = 0.0
    scaling: Range = (0.7, 1.4)
    """Above 1: objects get smaller."""
    p_scaling_per_axis: float = 0.0
    """Probability that each axis has a scaling of its own."""
    p_elastic: float = 0.0
    elastic_voxels: Range = (2.0, 8.0)
    """Largest displacement."""
    elastic_spacing_voxels: Range = (24.0, 48.0)
    """Distance of the control points."""

    def draw(self, random: CounterRandom, context: SampleContext) -> SpatialDraw | None:
        # Always three numbers, also for probabilities of 0: the later draws depend on their
        # positions.
        is_rotated = random.draw_bool(self.p_rotation)
        is_scaled = random.draw_bool(self.p_scaling)
        is_deformed = random.draw_bool(self.p_elastic)
        if not (is_rotated or is_scaled or is_deformed):
            return None
        angles = self._draw_angles(random, context) if is_rotated else (0.0, 0.0, 0.0)
        scaling = self._draw_scaling(random, context) if is_scaled else [1.0, 1.0, 1.0]
        control = self._draw_control_points(context) if is_deformed else None
        return SpatialDraw(rotation_matrix(angles) @ np.diag(scaling), is_rotated, control)

    def apply(self, sample: Sample, parameters: SpatialDraw, context: SampleContext) -> None:
        sample.channels_DHW, sample.label_DHW = resample_patch(
            sample.channels_DHW,
            sample.label_DHW,
            parameters,
            context.patch_size,
            outside=sample.air_values,
            tables=context.tables,
        )

    def list_tables(
        self, parameters: SpatialDraw, field_shape: Index3, context: SampleContext
    ) -> list[TableKey]:
        return list_resampling_tables(parameters, field_shape, context.patch_size)

    def describe(self, parameters: SpatialDraw) -> list[str]:
        angle, scaling = _decompose_matrix(parameters.matrix)
        notes = []
        if parameters.is_rotated:
            notes.append(f"rotated by {math.degrees(angle):.0f} degrees")
        if np.ptp([*scaling, 1.0]) > 1e-9:
            # The inverse, because a matrix that enlarges the field makes objects smaller.
            notes.append("scaled by " + " ".join(f"{1 / factor:.2f}" for factor in scaling))
        if parameters.control_displacement is not None:
            notes.append("elastically deformed")
        return notes

    def _draw_angles(self, random: CounterRandom, context: SampleContext) -> Float3:
        if context.is_anisotropic:
            # A rotation out of plane would mix voxels of very different size.
            return random.draw_uniform(-math.pi, math.pi), 0.0, 0.0
        limit = math.radians(self.rotation_degrees)
        z, y, x = (random.draw_uniform(-limit, limit) for _ in range(3))
        return z, y, x

    def _draw_scaling(self, random: CounterRandom, context: SampleContext) -> list[float]:
        scaling = [random.draw_uniform(*self.scaling)] * 3
        if random.draw_bool(self.p_scaling_per_axis):
            scaling = [random.draw_uniform(*self.scaling) for _ in range(3)]
        if context.is_anisotropic:
            scaling[0] = 1.0
        return scaling

    def _draw_control_points(self, context: SampleContext) -> np.ndarray:
        # A stream of its own: the number of control points must not shift the later draws.
        random = CounterRandom(context.seed, 0, _ELASTIC_STREAM)
        spacing = random.draw_uniform(*self.elastic_spacing_voxels)
        largest = random.draw_uniform(*self.elastic_voxels)
        # One knot beyond each end of the patch, which a cubic spline needs.
        counts = [max(1, round(size / spacing)) + 3 for size in context.patch_size]
        values = [random.draw_uniform(-1.0, 1.0) for _ in range(3 * math.prod(counts))]
        control = np.array(values).reshape(3, *counts) * largest
        # No displacement across thick slices.
        if context.is_anisotropic:
            control[0] = 0.0
        return control


@dataclass(frozen=True)
class MirrorTransform(Transform):
    """Mirroring of each axis with a probability of 0.5."""

    axes: tuple[int, ...] = ()
    """Axes (0: z, 1: y, 2: x) that may be mirrored."""

    def draw(self, random: CounterRandom, context: SampleContext) -> tuple[int, ...] | None:
        # One number for each axis, so that a choice of axes does not change any later draw.
        mirrored = []
        for axis in range(3):
            if random.draw_bool(0.5) and axis in self.axes:
                mirrored.append(axis)
        return tuple(mirrored) or None

    def apply(self, sample: Sample, parameters: tuple[int, ...], context: SampleContext) -> None:
        sample.channels_DHW = [image.flip(parameters) for image in sample.channels_DHW]
        sample.label_DHW = sample.label_DHW.flip(parameters)

    def describe(self, parameters: tuple[int, ...]) -> list[str]:
        return ["mirrored " + "".join("zyx"[axis] for axis in parameters)]


def field_shape(draw: SpatialDraw, patch_size: Index3) -> Index3:
    """Return the size (z, y, x) of the field that a spatial transform samples.

    The field has the patch's centre and contains every sampled position and its neighbours.
    """
    half = (np.asarray(patch_size) - 1) / 2
    if draw.control_displacement is not None:
        half = half + np.abs(draw.control_displacement).max(axis=(1, 2, 3))
    reach = np.abs(draw.matrix) @ half
    shape = []
    for axis_reach, size in zip(reach, patch_size, strict=True):
        # Up to the right-hand neighbour of the farthest position.
        margin = math.ceil(axis_reach + 0.5 - size / 2 + 1e-6)
        # The same parity as the patch, so that both have one centre.
        shape.append(size + 2 * max(0, margin))
    z, y, x = shape
    return z, y, x


def rotation_matrix(angles: Float3) -> np.ndarray:
    """Return the rotation of (z, y, x) vectors about the first, then second, then third axis.

    Args:
        angles: radians about the array axes 0, 1 and 2.
    """
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        first, second = [other for other in range(3) if other != axis]
        if axis == 1:
            first, second = second, first  # keeps every rotation right-handed
        rotation = np.eye(3)
        rotation[first, first] = rotation[second, second] = math.cos(angle)
        rotation[first, second] = -math.sin(angle)
        rotation[second, first] = math.sin(angle)
        matrix = rotation @ matrix
    return matrix


def _decompose_matrix(matrix: np.ndarray) -> tuple[float, list[float]]:
    """Return the total angle of the rotation (radians) and the scaling of each axis."""
    scaling = np.linalg.norm(matrix, axis=0)
    trace = np.trace(matrix / scaling)
    return math.acos(min(1.0, max(-1.0, (trace - 1) / 2))), scaling.tolist()
