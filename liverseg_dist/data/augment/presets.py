"""What augmentation a sample gets: named presets, and the draw of one sample's parameters.

A draw is a pure function of (preset, patch size, augmentation seed): the loader uses it to read as much surrounding as
the rotation needs, the device to transform, and both agree without talking. Probabilities, ranges and the order of the
transforms of `nnunet` are those of nnU-Net v2's default trainer (https://github.com/MIC-DKFZ/nnUNet,
`nnUNetTrainer.get_training_transforms` and `configure_rotation_dummyDA_mirroring_and_inital_patch_size`).
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from liverseg_dist.config import DataConfig
from liverseg_dist.data.counter_random import CounterRandom
from liverseg_dist.volume import Float3, Index3

PresetName = Literal["none", "light", "nnunet", "strong"]
Range = tuple[float, float]

ANISOTROPY_THRESHOLD = 3
"""Patches with one side this many times the first one are rotated in plane only (nnU-Net's dummy 2D augmentation)."""
_DRAW, _ELASTIC = 16, 17  # purposes of the random streams


@dataclass(frozen=True)
class Preset:
    """Probabilities (`p_`) and ranges to draw from uniformly; one marked `balanced`: half below, half above 1."""

    p_rotation: float = 0.0
    rotation_degrees: float = 30.0
    """Largest angle about each axis; in-plane patches of anisotropic data turn by up to 180."""
    p_scaling: float = 0.0
    scaling: Range = (0.7, 1.4)
    """Above 1: objects get smaller."""
    p_scaling_per_axis: float = 0.0
    """Probability that each axis is scaled by itself."""
    p_elastic: float = 0.0
    elastic_voxels: Range = (2.0, 8.0)
    """Largest displacement."""
    elastic_spacing_voxels: Range = (24.0, 48.0)
    """Distance of the control points."""
    mirror_axes: tuple[int, ...] = ()
    p_noise: float = 0.0
    noise_sigma: Range = (0.0, 0.1)
    p_blur: float = 0.0
    blur_sigma_voxels: Range = (0.5, 1.0)
    p_brightness: float = 0.0
    brightness: Range = (0.75, 1.25)
    """balanced"""
    p_contrast: float = 0.0
    contrast: Range = (0.75, 1.25)
    """balanced"""
    p_low_resolution: float = 0.0
    low_resolution: Range = (0.5, 1.0)
    p_thick_slices: float = 0.0
    slice_thickness: Range = (1.5, 3.0)
    """In slices: neighbours are averaged as a scanner with thicker slices does."""
    p_inverted_gamma: float = 0.0
    p_gamma: float = 0.0
    gamma: Range = (0.7, 1.5)
    """balanced"""
    p_enhancement: float = 0.0
    enhancement: Range = (-0.3, 0.3)
    """Contrast-phase shift: liver and tumour change by separate amounts, in standard deviations of the image."""
    p_tumour_copy: float = 0.0
    tumour_copy_reach: float = 0.25
    """The patch's tumours are shown a second time in its liver, up to this share of the patch away, turned over."""


PRESETS: dict[PresetName, Preset] = {
    "none": Preset(),
    "light": Preset(mirror_axes=(0, 1, 2), p_noise=0.1, p_brightness=0.15, p_contrast=0.15),
    "nnunet": Preset(
        p_rotation=0.2,
        p_scaling=0.2,
        mirror_axes=(0, 1, 2),
        p_noise=0.1,
        p_blur=0.1,  # nnU-Net: 0.2 per image, then 0.5 per channel; there is one channel
        p_brightness=0.15,
        p_contrast=0.15,
        p_low_resolution=0.125,  # nnU-Net: 0.25 per image, then 0.5 per channel
        p_inverted_gamma=0.1,
        p_gamma=0.3,
    ),
    "strong": Preset(
        p_rotation=0.4,
        p_scaling=0.4,
        p_scaling_per_axis=0.5,
        p_elastic=0.2,
        mirror_axes=(0, 1, 2),
        p_noise=0.2,
        p_blur=0.2,
        p_brightness=0.3,
        brightness=(0.7, 1.3),
        p_contrast=0.3,
        contrast=(0.65, 1.5),
        p_low_resolution=0.2,
        p_thick_slices=0.15,
        p_inverted_gamma=0.1,
        p_gamma=0.3,
        p_enhancement=0.2,
        p_tumour_copy=0.2,
    ),
}


def augmentation_preset(data: DataConfig) -> Preset:
    """The augmentation that a run's settings ask for."""
    preset = PRESETS[data.augmentation]
    if data.mirror_axes is None:
        return preset
    return replace(
        preset, mirror_axes=tuple(sorted("zyx".index(axis) for axis in set(data.mirror_axes)))
    )


@dataclass(frozen=True, eq=False)
class SpatialDraw:
    """Output voxel p (z, y, x, from the patch's centre) shows the input at `matrix @ (p + displacement(p))`."""

    matrix: np.ndarray
    """3x3: rotation times scaling."""
    rotates: bool
    control_displacement: np.ndarray | None
    """Elastic: displacement in voxels (3, nz, ny, nx) at the control points of a cubic B-spline, or None."""


@dataclass(frozen=True, eq=False)
class AugmentDraw:
    """The parameters of one sample; None: that transform was not drawn."""

    spatial: SpatialDraw | None = None
    field_shape: Index3 | None = None
    """Voxels (z, y, x), around the patch's centre, that the spatial transform looks at; None: the patch itself."""
    mirrored_axes: tuple[int, ...] = ()
    noise_sigma: float | None = None
    blur_sigma_voxels: Float3 | None = None
    brightness: float | None = None
    contrast: float | None = None
    low_resolution: float | None = None
    slice_thickness: float | None = None
    inverted_gamma: float | None = None
    gamma: float | None = None
    enhancement: tuple[float, float] | None = None
    """Added to liver, to tumour."""
    tumour_copy: "TumourCopy | None" = None
    in_plane_only: bool = False


@dataclass(frozen=True)
class TumourCopy:
    """Where the patch's tumours are shown again: turned over along `flipped_axes`, then moved by `shift` voxels."""

    flipped_axes: tuple[int, ...]
    shift: Index3


def describe_augmentation(draw: AugmentDraw) -> list[str]:
    """The drawn transforms in words, in their order."""
    said = []
    if draw.spatial is not None:
        turn, scaling = _angle_and_scaling(draw.spatial.matrix)
        said += [f"turned by {math.degrees(turn):.0f} degrees"] if draw.spatial.rotates else []
        said += (
            ["scaled by " + " ".join(f"{1 / s:.2f}" for s in scaling)]
            if np.ptp([*scaling, 1.0]) > 1e-9
            else []
        )
        said += ["bent"] if draw.spatial.control_displacement is not None else []
    if draw.tumour_copy is not None:
        said.append("tumours shown again")
    if draw.enhancement is not None:
        said.append("enhancement {:+.2f} {:+.2f}".format(*draw.enhancement))
    for name, value in (
        ("slices thicker by", draw.slice_thickness),
        ("noise", draw.noise_sigma),
        ("blur", max(draw.blur_sigma_voxels) if draw.blur_sigma_voxels else None),
        ("brightness", draw.brightness),
        ("contrast", draw.contrast),
        ("resolution", draw.low_resolution),
        ("inverted gamma", draw.inverted_gamma),
        ("gamma", draw.gamma),
    ):
        said += [f"{name} {value:.2f}"] if value is not None else []
    said += (
        ["mirrored " + "".join("zyx"[axis] for axis in draw.mirrored_axes)]
        if draw.mirrored_axes
        else []
    )
    return said


def _angle_and_scaling(matrix: np.ndarray) -> tuple[float, list[float]]:
    """Total angle of the rotation (radians), and the scaling of each axis."""
    scaling = np.linalg.norm(matrix, axis=0)
    trace = np.trace(matrix / scaling)
    return math.acos(min(1.0, max(-1.0, (trace - 1) / 2))), scaling.tolist()


def draw_augmentation(preset: Preset, patch_size: Index3, seed: int) -> AugmentDraw:
    """The augmentation of the sample with this seed (0 <= seed < 2**63)."""
    if preset == PRESETS["none"]:
        return _NOTHING
    return _draw_cached(preset, patch_size, seed)


_NOTHING = AugmentDraw()


@lru_cache(maxsize=1024)
def _draw_cached(preset: Preset, patch_size: Index3, seed: int) -> AugmentDraw:
    random = CounterRandom(seed, 0, _DRAW)
    in_plane = max(patch_size) / patch_size[0] > ANISOTROPY_THRESHOLD
    spatial = _draw_spatial(preset, patch_size, random, seed, in_plane)

    def drawn(probability: float, bounds: Range, *, balanced: bool = False) -> float | None:
        if probability <= 0 or not random.chance(probability):
            return None
        return _balanced(random, bounds) if balanced else random.uniform(*bounds)

    noise = drawn(preset.p_noise, preset.noise_sigma)
    sigma_z = drawn(preset.p_blur, preset.blur_sigma_voxels)
    blur = None
    if sigma_z is not None:
        blur = (
            sigma_z,
            random.uniform(*preset.blur_sigma_voxels),
            random.uniform(*preset.blur_sigma_voxels),
        )
    liver = drawn(preset.p_enhancement, preset.enhancement)
    drawn_so_far = AugmentDraw(
        spatial=spatial,
        field_shape=_field_shape(spatial, patch_size) if spatial else None,
        noise_sigma=noise,
        blur_sigma_voxels=blur,
        brightness=drawn(preset.p_brightness, preset.brightness, balanced=True),
        contrast=drawn(preset.p_contrast, preset.contrast, balanced=True),
        low_resolution=drawn(preset.p_low_resolution, preset.low_resolution),
        slice_thickness=drawn(preset.p_thick_slices, preset.slice_thickness),
        inverted_gamma=drawn(preset.p_inverted_gamma, preset.gamma, balanced=True),
        gamma=drawn(preset.p_gamma, preset.gamma, balanced=True),
        mirrored_axes=tuple(
            axis for axis in range(3) if random.chance(0.5) and axis in preset.mirror_axes
        ),
        enhancement=None if liver is None else (liver, random.uniform(*preset.enhancement)),
        in_plane_only=in_plane,
    )
    if preset.p_tumour_copy <= 0 or not random.chance(preset.p_tumour_copy):
        return drawn_so_far
    return replace(drawn_so_far, tumour_copy=_draw_tumour_copy(preset, patch_size, random))


def _draw_tumour_copy(preset: Preset, patch_size: Index3, random: CounterRandom) -> TumourCopy:
    flipped = tuple(axis for axis in range(3) if random.chance(0.5))
    z, y, x = (
        round(random.uniform(-1.0, 1.0) * preset.tumour_copy_reach * size) for size in patch_size
    )
    return TumourCopy(flipped, (z, y, x))


def _draw_spatial(
    preset: Preset, patch_size: Index3, random: CounterRandom, seed: int, in_plane: bool
) -> SpatialDraw | None:
    rotates = random.chance(preset.p_rotation)
    scales = random.chance(preset.p_scaling)
    bends = random.chance(preset.p_elastic)
    if not (rotates or scales or bends):
        return None
    angles, scaling = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    if rotates:
        limit = math.pi if in_plane else math.radians(preset.rotation_degrees)
        angles = [0.0 if in_plane and axis else random.uniform(-limit, limit) for axis in range(3)]
    if scales:
        scaling = [random.uniform(*preset.scaling)] * 3
        if random.chance(preset.p_scaling_per_axis):
            scaling = [random.uniform(*preset.scaling) for _ in range(3)]
        if in_plane:
            scaling[0] = 1.0
    control = _draw_control_points(preset, patch_size, seed, in_plane) if bends else None
    z, y, x = angles
    return SpatialDraw(rotation_matrix((z, y, x)) @ np.diag(scaling), rotates, control)


def _draw_control_points(
    preset: Preset, patch_size: Index3, seed: int, in_plane: bool
) -> np.ndarray:
    random = CounterRandom(seed, 0, _ELASTIC)
    spacing = random.uniform(*preset.elastic_spacing_voxels)
    largest = random.uniform(*preset.elastic_voxels)
    counts = [max(1, round(size / spacing)) + 3 for size in patch_size]  # one knot beyond each end
    values = [random.uniform(-1.0, 1.0) for _ in range(3 * math.prod(counts))]
    control = np.array(values).reshape(3, *counts) * largest
    if in_plane:
        control[0] = 0.0
    return control


def rotation_matrix(angles: Float3) -> np.ndarray:
    """Rotation of (z, y, x) vectors by `angles` (radians) about the first, then second, then third array axis."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        first, second = [other for other in range(3) if other != axis]
        if axis == 1:
            first, second = second, first  # keeps every rotation right-handed
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = math.cos(angle)
        turn[first, second], turn[second, first] = -math.sin(angle), math.sin(angle)
        matrix = turn @ matrix
    return matrix


def _field_shape(spatial: SpatialDraw, patch_size: Index3) -> Index3:
    """The box around the centre that holds every point the transform looks at, and the voxels next to them."""
    half = (np.asarray(patch_size) - 1) / 2
    if spatial.control_displacement is not None:
        half = half + np.abs(spatial.control_displacement).max(axis=(1, 2, 3))
    reach = np.abs(spatial.matrix) @ half
    shape = []
    for axis_reach, size in zip(reach, patch_size, strict=True):
        margin = math.ceil(
            axis_reach + 0.5 - size / 2 + 1e-6
        )  # the farthest point's right-hand neighbour
        shape.append(
            size + 2 * max(0, margin)
        )  # the same parity as the patch, so both have one centre
    z, y, x = shape
    return z, y, x


def _balanced(random: CounterRandom, bounds: Range) -> float:
    low, high = bounds
    if low < 1 and random.chance(0.5):
        return random.uniform(low, 1.0)
    return random.uniform(max(low, 1.0), high)
