"""Every transform against a named reference (batchgeneratorsv2, scipy, numpy, MONAI) with equal parameters."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform, create_affine_matrix_3d
from monai.transforms import Affine as MonaiAffine
from scipy import ndimage, stats

from liverseg_dist.config import DataConfig
from liverseg_dist.config.train import AugmentationPreset
from liverseg_dist.data.augment import (
    PRESETS,
    DeviceTransform,
    Preset,
    build_preset,
    describe_augmentation,
    draw_augmentation,
    intensity_transforms,
    lesion_transforms,
    normalise_intensity,
    spatial_resampling,
)
from liverseg_dist.data.augment.host_tables import NO_TABLES, DeviceTables
from liverseg_dist.data.augment.lesion_transforms import (
    LesionCopyTransform,
    copyable_values,
    enhancing_values,
)
from liverseg_dist.data.augment.presets import APPLY_ORDER, AugmentDraw
from liverseg_dist.data.augment.spatial_resampling import SpatialDraw
from liverseg_dist.data.augment.spatial_transforms import MirrorTransform, rotation_matrix
from liverseg_dist.data.augment.transform import SampleContext
from liverseg_dist.labels import LITS_SCHEME

PATCH = (12, 20, 24)
OUTSIDE = -1.5


def make_volume(shape: tuple[int, int, int] = PATCH, seed: int = 0) -> torch.Tensor:
    """Smooth and rough parts, as in CT."""
    rough = np.random.default_rng(seed).normal(size=shape)
    return torch.from_numpy(
        (ndimage.gaussian_filter(rough, 2) * 8 + rough * 0.2).astype(np.float32)
    )


def make_labels(shape: tuple[int, int, int] = PATCH) -> torch.Tensor:
    smooth = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=shape), 2)
    return torch.from_numpy(np.digitize(smooth, np.quantile(smooth, [0.6, 0.9])).astype(np.uint8))


def assert_close(result: torch.Tensor, reference: object, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(result.numpy(), np.asarray(reference), rtol=0, atol=tolerance)


def resample_one(
    image: torch.Tensor, label: torch.Tensor, draw: SpatialDraw, patch: tuple, outside: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Resample an image of one channel."""
    (result,), result_label = spatial_resampling.resample_patch(
        [image], label, draw, patch, [outside]
    )
    return result, result_label


def copy_one(
    image: torch.Tensor, label: torch.Tensor, flipped: tuple, shift: tuple
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the tumours of a patch of one channel."""
    pairs = copyable_values(LITS_SCHEME)
    assert pairs == (((2,), (1,)),)
    (result,), result_label = lesion_transforms.copy_lesions([image], label, pairs, flipped, shift)
    return result, result_label


# --- spatial ------------------------------------------------------------------------------------------------------


def test_rotation_matrix_is_batchgenerators() -> None:
    for angles in ((0.3, 0.0, 0.0), (0.0, 0.3, 0.0), (0.0, 0.0, 0.3), (0.3, -0.5, 1.1)):
        np.testing.assert_allclose(
            rotation_matrix(angles), create_affine_matrix_3d(angles, (1, 1, 1)), atol=1e-12
        )


@pytest.mark.parametrize(
    ("angles", "scaling"),
    [((0.4, -0.2, 0.3), (1.2, 0.8, 1.1)), ((0, 0, 0.5), (1, 1, 1)), ((0, 0, 0), (0.8, 0.8, 0.8))],
)
def test_rotation_and_scaling_against_batchgenerators(angles: tuple, scaling: tuple) -> None:
    field_shape = (14, 30, 34)
    image, label = make_volume(field_shape), make_labels(field_shape)
    draw = SpatialDraw(rotation_matrix(angles) @ np.diag(scaling), any(angles), None)
    result, result_label = resample_one(image.clone(), label, draw, PATCH, OUTSIDE)
    reference = SpatialTransform(
        PATCH, 0, random_crop=False, p_rotation=1, rotation=lambda image, dim: angles[dim],
        p_scaling=1, scaling=lambda image, dim: scaling[dim], p_synchronize_scaling_across_axes=-1,
        mode_seg="nearest", border_mode_seg="constant", padding_value_seg=255,
        padding_mode_image="constant", padding_value_image=OUTSIDE,
    )  # fmt: skip
    expected = reference(image=image[None].clone(), segmentation=label[None].to(torch.int16))
    assert_close(result, expected["image"][0], 1e-4)
    agree = (result_label.numpy() == expected["segmentation"][0].numpy()).mean()
    assert agree > 0.9995, "only a point half-way between two voxels may fall either way"


def test_rotation_and_scaling_against_scipy_and_monai() -> None:
    image = make_volume((16, 32, 32))
    matrix = rotation_matrix((0.3, 0.1, -0.2)) @ np.diag((0.9, 1.0, 0.8))
    draw = SpatialDraw(matrix, True, None)
    result, _ = resample_one(
        image.clone(), torch.zeros(image.shape, dtype=torch.uint8), draw, PATCH, 0.0
    )
    offset = (np.array(image.shape) - 1) / 2 - matrix @ ((np.array(PATCH) - 1) / 2)
    scipys = ndimage.affine_transform(
        image.numpy().astype(np.float64),
        matrix,
        offset,
        output_shape=PATCH,
        order=1,
        mode="grid-constant",
    )
    assert_close(result, scipys, 1e-4)
    homogeneous = np.eye(4)
    homogeneous[:3, :3] = matrix
    monais, _ = MonaiAffine(affine=homogeneous, spatial_size=PATCH, padding_mode="zeros")(
        image[None]
    )
    assert_close(result, np.asarray(monais)[0], 1e-4)


@pytest.mark.parametrize("scaling", [(0.83, 0.83, 0.83), (1.31, 1.31, 1.31), (1.0, 0.72, 1.4)])
def test_separable_scaling_equals_the_grid(scaling: tuple) -> None:
    field_shape = (14, 24, 28)
    image, label = make_volume(field_shape), make_labels(field_shape)
    draw = SpatialDraw(np.diag(scaling), False, None)
    result, result_label = resample_one(image.clone(), label, draw, PATCH, OUTSIDE)
    grids, grid_label = resample_one(
        image.clone(), label, replace(draw, is_rotated=True), PATCH, OUTSIDE
    )
    assert_close(result, grids)
    assert (result_label == grid_label).float().mean() > 0.999


def test_elastic_against_scipy() -> None:
    control = np.random.default_rng(3).uniform(-3, 3, (3, 4, 5, 5))
    field = spatial_resampling.displacement_field(control, PATCH, torch.device("cpu"))
    knots = [
        np.linspace(1.0, count - 2.0, size)
        for count, size in zip(control.shape[1:], PATCH, strict=True)
    ]
    places = np.meshgrid(*knots, indexing="ij")
    expected = [ndimage.map_coordinates(c, places, order=3, prefilter=False) for c in control]
    assert_close(field, expected)
    image = make_volume((20, 30, 34))
    matrix = rotation_matrix((0.0, 0.2, 0.1))
    draw = SpatialDraw(matrix, True, control)
    result, _ = resample_one(
        image.clone(), torch.zeros(image.shape, dtype=torch.uint8), draw, PATCH, 0.0
    )
    points = np.stack(
        np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in PATCH], indexing="ij")
    ) + np.stack(expected)
    where = (
        np.einsum("ij,jzyx->izyx", matrix, points)
        + (np.array(image.shape)[:, None, None, None] - 1) / 2
    )
    scipys = ndimage.map_coordinates(
        image.numpy().astype(np.float64), where, order=1, mode="grid-constant"
    )
    assert_close(result, scipys, 1e-4)


def test_ignored_voxels_survive_and_the_outside_is_ignored() -> None:
    label = torch.full((12, 20, 24), 1, dtype=torch.uint8)
    label[:, :, :6] = 255
    image = torch.zeros(label.shape)
    for draw in (
        SpatialDraw(np.eye(3) * 1.2, False, None),
        SpatialDraw(rotation_matrix((0.5, 0, 0)) * 1.2, True, None),
    ):
        moved, out = resample_one(image.clone(), label, draw, PATCH, OUTSIDE)
        assert set(out.unique().tolist()) == {1, 255}
        assert out[0, 0, 0] == 255
        assert moved[0, 0, -1].item() == pytest.approx(OUTSIDE)
        assert moved[6, 10, 12].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("preset", ["nnunet", "strong"])
def test_field_contains_every_sampled_voxel(preset: AugmentationPreset) -> None:
    """A larger field changes nothing, a smaller one does."""
    drawn = [draw_augmentation(PRESETS[preset], PATCH, seed) for seed in range(120)]
    transformed = [d for d in drawn if "spatial" in d.parameters and d.field_shape != PATCH]
    assert len(transformed) > 12
    for draw in transformed[:12]:
        spatial, shape = draw.parameters["spatial"], draw.field_shape
        assert shape is not None
        large = (shape[0] + 20, shape[1] + 20, shape[2] + 20)
        image, label = make_volume(large), make_labels(large)

        def resample(
            field: tuple[int, int, int],
            image: torch.Tensor = image,
            label: torch.Tensor = label,
            spatial: SpatialDraw = spatial,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            image_field = spatial_resampling.crop_centre(image, field).clone()
            label_field = spatial_resampling.crop_centre(label, field)
            return resample_one(image_field, label_field, spatial, PATCH, OUTSIDE)

        full = resample(large)
        exact = resample(shape)
        assert_close(exact[0], full[0], 1e-4)
        assert (exact[1] == full[1]).float().mean() > 0.999
        # The reach of an elastic deformation is known as an upper bound only.
        if spatial.control_displacement is None:
            small = resample((shape[0] - 4, shape[1] - 4, shape[2] - 4))
            assert (small[0] - full[0]).abs().max() > 0.01


# --- intensity ----------------------------------------------------------------------------------------------------


def test_brightness_contrast_and_gamma_against_batchgenerators() -> None:
    pairs: list[tuple[Callable, object]] = [
        (
            lambda x: intensity_transforms.scale_brightness(x, 1.2),
            MultiplicativeBrightnessTransform(1.2, False),
        ),
        (
            lambda x: intensity_transforms.scale_contrast(x, 1.25),
            ContrastTransform(1.25, True, False),
        ),
        (
            lambda x: intensity_transforms.scale_contrast(x, 0.75),
            ContrastTransform(0.75, True, False),
        ),
        (lambda x: intensity_transforms.change_gamma(x, 1.4), GammaTransform(1.4, 0, False, 1, 1)),
        (lambda x: intensity_transforms.change_gamma(x, 0.7), GammaTransform(0.7, 0, False, 1, 1)),
        (
            lambda x: intensity_transforms.change_gamma(x, 0.8, inverted=True),
            GammaTransform(0.8, 1, False, 1, 1),
        ),
    ]
    for transform, reference in pairs:
        image = make_volume()
        assert_close(transform(image.clone()), reference(image=image[None].clone())["image"][0])  # type: ignore[operator]


def test_gamma_of_a_constant_image_stays_finite() -> None:
    for inverted in (False, True):
        out = intensity_transforms.change_gamma(torch.full(PATCH, -1.5), 0.7, inverted=inverted)
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("sigma", [(0.5, 0.5, 0.5), (0.6, 0.75, 1.0), (0.95, 0.8, 0.55)])
def test_blur_against_batchgenerators_and_scipy(sigma: tuple) -> None:
    image = make_volume()
    result = intensity_transforms.blur_gaussian(image.clone(), sigma)
    reference = GaussianBlurTransform(lambda shape, dim: sigma[dim - 1], False, False, 1)(
        image=image[None].clone()
    )
    assert_close(result, reference["image"][0])
    radius = [int(3 * s + 0.25) for s in sigma]
    assert_close(
        result,
        ndimage.gaussian_filter(
            image.numpy().astype(np.float64), sigma, mode="mirror", radius=radius
        ),
    )


@pytest.mark.parametrize("in_plane_only", [False, True])
def test_low_resolution_against_batchgenerators(in_plane_only: bool) -> None:
    image = make_volume()
    result = intensity_transforms.lower_resolution(image.clone(), 0.6, in_plane_only=in_plane_only)
    reference = SimulateLowResolutionTransform(0.6, False, True, (0,) if in_plane_only else None)
    assert_close(result, reference(image=image[None].clone())["image"][0])


def test_noise_is_normal_and_a_function_of_the_seed() -> None:
    noise = [intensity_transforms.add_noise(torch.zeros(PATCH), 0.1, seed) for seed in (1, 1, 2)]
    assert torch.equal(noise[0], noise[1])
    assert abs(np.corrcoef(noise[0].ravel(), noise[2].ravel())[0, 1]) < 0.05
    assert stats.kstest(noise[0].ravel().numpy(), stats.norm(0, 0.1).cdf).pvalue > 0.01


def test_thick_slices_against_numpy() -> None:
    image = make_volume()
    averaged = image.numpy().reshape(6, 2, 20, 24).mean(1)
    centres = np.arange(6) * 2 + 0.5
    expected = np.apply_along_axis(
        lambda line: np.interp(np.arange(12), centres, line), 0, averaged
    )
    assert_close(intensity_transforms.thicken_slices(image, 2.0), expected)
    flat = torch.full(PATCH, 0.7)
    for thickness in (1.5, 2.3, 3.0, 40.0):
        assert_close(intensity_transforms.thicken_slices(flat, thickness), flat)


def test_enhancement_changes_liver_and_tumour_separately() -> None:
    image, label = make_volume(), make_labels()
    expected = image.numpy() + np.select([label.numpy() == 1, label.numpy() == 2], [0.2, -0.1], 0.0)
    tissues = enhancing_values(LITS_SCHEME)
    assert tissues == ((1,), (2,))
    shifted = lesion_transforms.shift_enhancement(image.clone(), label, tissues, (0.2, -0.1))
    assert_close(shifted, expected)


@pytest.mark.parametrize(
    ("flipped", "shift"),
    [((), (0, 9, -7)), ((2,), (-3, 0, 5)), ((0, 1, 2), (2, -4, 11)), ((), (0, 0, 0))],
)
def test_copied_tumours_against_scipy(
    flipped: tuple[int, ...], shift: tuple[int, int, int]
) -> None:
    image, label = make_volume(), make_labels()
    before = image.clone(), label.clone()
    pasted, marked = copy_one(image, label, flipped, shift)
    assert torch.equal(image, before[0])
    assert torch.equal(label, before[1])
    moved_image, moved_label = (
        ndimage.shift(np.flip(v.numpy(), flipped), shift, order=0, cval=0.0) for v in (image, label)
    )
    where = (moved_label == 2) & (label.numpy() == 1)
    assert where.any() == (shift != (0, 0, 0))
    fade = np.where(
        where, ndimage.uniform_filter(where.astype(np.float64), 3, mode="constant"), 0.0
    )
    assert_close(pasted, image.numpy() + fade * (moved_image - image.numpy()))
    np.testing.assert_array_equal(marked.numpy(), np.where(where, 2, label.numpy()))


def test_tumour_copies_have_the_presets_probability_and_leave_other_draws_unchanged() -> None:
    strong = PRESETS["strong"]
    without = replace(strong, lesion_copy=LesionCopyTransform())
    draws = [draw_augmentation(strong, (64, 128, 128), seed) for seed in range(1000)]
    copies = find_drawn(draws, "lesion_copy")
    assert is_frequency_plausible(len(copies), len(draws), 0.2)
    shifts = np.abs([copy.shift for copy in copies])
    assert (shifts <= (16, 32, 32)).all()
    assert (shifts.max(axis=0) > (13, 28, 28)).all()
    for seed in range(50):
        others = dict(draws[seed].parameters)
        others.pop("lesion_copy", None)
        reference = draw_augmentation(without, (64, 128, 128), seed).parameters
        assert repr(others) == repr(dict(reference))


# --- presets ------------------------------------------------------------------------------------


def find_drawn(draws: list[AugmentDraw], name: str) -> list:
    """The parameters of one transform, of the samples for which it was drawn."""
    return [first_channel(draw.parameters[name]) for draw in draws if name in draw.parameters]


def first_channel(parameters: Any) -> Any:
    """The parameters of the only channel, of a transform that draws for each channel."""
    is_per_channel = isinstance(parameters, tuple) and len(parameters) == 1
    return parameters[0] if is_per_channel else parameters


def is_frequency_plausible(hits: int, count: int, probability: float) -> bool:
    return stats.binomtest(hits, count, probability).pvalue > 0.001


def test_every_transform_has_a_place_in_the_order_of_application() -> None:
    assert sorted(APPLY_ORDER) == sorted(Preset().transforms())


def test_nnunet_preset_draws_with_nnunets_probabilities_and_ranges() -> None:
    count = 3000
    draws = [draw_augmentation(PRESETS["nnunet"], (64, 128, 128), seed) for seed in range(count)]
    spatial = find_drawn(draws, "spatial")
    assert is_frequency_plausible(len(spatial), count, 1 - 0.8 * 0.8)
    assert is_frequency_plausible(sum(draw.is_rotated for draw in spatial), count, 0.2)
    expected = {
        "noise": (0.1, 0, 0.1),
        "blur": (0.2 * 0.5, 0.5, 1.0),
        "brightness": (0.15, 0.75, 1.25),
        "contrast": (0.15, 0.75, 1.25),
        "low_resolution": (0.25 * 0.5, 0.5, 1.0),
        "inverted_gamma": (0.1, 0.7, 1.5),
        "gamma": (0.3, 0.7, 1.5),
    }
    for name, (probability, low, high) in expected.items():
        values = np.array(find_drawn(draws, name))
        assert is_frequency_plausible(len(values), count, probability), name
        assert low <= values.min() < low + 0.1 * (high - low), name
        assert high - 0.1 * (high - low) < values.max() <= high, name
    # Half of the factors are below 1, for every range.
    for name in ("brightness", "contrast", "gamma"):
        values = np.array(find_drawn(draws, name))
        assert is_frequency_plausible(int((values < 1).sum()), len(values), 0.5), name
    mirrored = [axis for draw in draws for axis in draw.parameters.get("mirror", ())]
    for axis in range(3):
        assert is_frequency_plausible(mirrored.count(axis), count, 0.5)
    assert find_drawn(draws, "thick_slices") == []
    assert find_drawn(draws, "enhancement") == []


def test_nnunet_rotations_and_scalings() -> None:
    draws = [draw_augmentation(PRESETS["nnunet"], (64, 128, 128), seed) for seed in range(3000)]
    matrices = [draw.matrix for draw in find_drawn(draws, "spatial")]
    scales = np.array([np.linalg.svd(matrix, compute_uv=False) for matrix in matrices])
    assert np.ptp(scales, axis=1).max() < 1e-9, "one scale for all axes"
    drawn = scales[np.abs(scales[:, 0] - 1) > 1e-9, 0]
    assert 0.7 <= drawn.min() < 0.75
    assert 1.35 < drawn.max() <= 1.4
    about_y = []
    for matrix, scale in zip(matrices, scales, strict=True):
        about_y.append(np.arcsin(-matrix[2, 0] / scale[0]))
    assert math.radians(25) < np.abs(about_y).max() <= math.radians(30) + 1e-9


def test_anisotropic_patches_are_rotated_in_plane_only() -> None:
    patch = (20, 96, 96)
    assert SampleContext(patch, 0).is_anisotropic
    assert not SampleContext((32, 96, 96), 0).is_anisotropic
    presets: tuple[AugmentationPreset, ...] = ("nnunet", "strong")
    for preset in presets:
        draws = [draw_augmentation(PRESETS[preset], patch, seed) for seed in range(600)]
        spatials = find_drawn(draws, "spatial")
        for spatial in spatials:
            np.testing.assert_array_equal(spatial.matrix[0], [1, 0, 0])
            np.testing.assert_array_equal(spatial.matrix[:, 0], [1, 0, 0])
        rotated = [spatial.matrix for spatial in spatials if spatial.is_rotated]
        angles = [math.atan2(matrix[2, 1], matrix[1, 1]) for matrix in rotated]
        assert max(map(abs, angles)) > math.radians(120), "any angle in plane"


def draw_values(draw: AugmentDraw) -> list:
    """All numbers of a draw, in a fixed order."""
    values: list = [draw.field_shape]
    for name in APPLY_ORDER:
        # It has been added after the draws were recorded.
        if name == "modality_dropout":
            continue
        parameters = draw.parameters.get(name)
        if isinstance(parameters, SpatialDraw):
            control = parameters.control_displacement
            values += [parameters.matrix.tolist(), bool(parameters.is_rotated)]
            values.append(None if control is None else control.tolist())
        elif name == "lesion_copy" and parameters is not None:
            values += [parameters.flipped_axes, parameters.shift]
        else:
            is_per_channel = parameters is not None and name != "mirror"
            values.append(parameters[0] if is_per_channel else parameters)
    return values


RECORDED_DRAWS = {
    "light": "dc8672100b571a75a4d42ff957ce86ed435c60ccddbdc2f966af5deaced599ed",
    "nnunet": "6522715daa8c71b1e0fa6d541d734551719b4d83d511028f9d9c92158b7c915c",
    "strong": "2697eaea6af34c1c74678cceed630368dc66c1cb0ecde5f4ada9f8c71dfe8c3e",
}
"""SHA-256 of the draws of 400 samples, recorded when a preset was one list of numbers."""


@pytest.mark.parametrize("preset", RECORDED_DRAWS)
def test_draws_are_the_recorded_ones(preset: AugmentationPreset) -> None:
    """A run that is resumed with a newer version must go on with the same augmentation."""
    values = []
    for patch in (PATCH, (20, 96, 96)):
        for seed in range(200):
            values.append(draw_values(draw_augmentation(PRESETS[preset], patch, seed)))
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    assert digest == RECORDED_DRAWS[preset]


# --- all transforms together --------------------------------------------------------------------


@dataclass
class RawBatch:
    image_BCDHW: torch.Tensor
    label_BDHW: torch.Tensor
    intensity_BC4: torch.Tensor
    present_BC: torch.Tensor
    augment_seed_B: torch.Tensor
    tables: ClassVar[DeviceTables] = NO_TABLES

    def select(self, samples: list[int]) -> "RawBatch":
        return RawBatch(*(tensor[samples] for tensor in vars(self).values()))


def raw_batch(count: int = 6, shape: tuple[int, int, int] = (36, 52, 60)) -> RawBatch:
    image = torch.stack([make_volume(shape, seed) * 90 + 60 for seed in range(count)])[:, None].to(
        torch.int16
    )
    statistics = torch.tensor([[[-100.0, 240.0, 0.55, 0.2]]] * count)
    present = torch.ones((count, 1), dtype=torch.bool)
    return RawBatch(
        image,
        torch.stack([make_labels(shape)] * count),
        statistics,
        present,
        torch.arange(40, 40 + count),
    )


def test_preset_none_normalises_only() -> None:
    batch = raw_batch(2, PATCH)
    image_BCDHW, label_BDHW = DeviceTransform(PRESETS["none"], PATCH)(batch)
    unit = (np.clip(batch.image_BCDHW.numpy().astype(np.float64), -100, 240) + 100) / 340
    assert_close(image_BCDHW, (unit - 0.55) / 0.2)
    assert image_BCDHW.dtype == torch.float32
    assert torch.equal(label_BDHW, batch.label_BDHW)


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_normalisation_returns_new_voxels(dtype: torch.dtype) -> None:
    hu = torch.tensor([-500, -100, 240, 900], dtype=dtype)
    before = hu.clone()
    assert_close(normalise_intensity(hu, -100, 240, 0.5, 0.25), [-2, -2, 2, 2])
    assert torch.equal(hu, before), "the input may be a view of the scan"


RECORDED_RESULTS = {
    "none": "20cefdd900f849b9da093a9f0c37dc6f785dbb367c01eb093c9a8ee88cf5e102",
    "light": "3245b767d54b4757b7898c94f62e64ba053bc6daa38e8085204ad90894e77f7c",
    "nnunet": "4d1a31e30b85901369925390cc691fcbad7f962ad8450c658055a94ba00125b3",
    "strong": "d3c1b291532ffa670ef2d9c314cde3753d677e52b0d2ad29161ef819804caee9",
}
"""SHA-256 of augmented samples, recorded when a preset was one list of numbers.

Recorded with torch 2.13 on a CPU with AVX-512: other versions and processors round differently.
"""


@pytest.mark.skipif(
    not torch.__version__.startswith("2.13") or torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="the results were recorded with torch 2.13 on a CPU with AVX-512",
)
@pytest.mark.parametrize("preset", RECORDED_RESULTS)
def test_augmented_voxels_are_the_recorded_ones(preset: AugmentationPreset) -> None:
    digest = hashlib.sha256()
    for patch, batch in ((PATCH, raw_batch(24)), ((8, 40, 44), raw_batch(24, (10, 60, 64)))):
        image_BCDHW, label_BDHW = DeviceTransform(PRESETS[preset], patch)(batch)
        digest.update(image_BCDHW.numpy().tobytes())
        digest.update(label_BDHW.numpy().tobytes())
    assert digest.hexdigest() == RECORDED_RESULTS[preset]


@pytest.mark.parametrize("preset", ["light", "nnunet", "strong"])
def test_sample_does_not_depend_on_its_batch(preset: AugmentationPreset) -> None:
    transform, batch = DeviceTransform(PRESETS[preset], PATCH), raw_batch(16)
    whole = transform(batch)
    assert torch.isfinite(whole[0]).all()
    for samples in ([3], [5, 0], [7, 15, 2, 1]):
        part = transform(batch.select(samples))
        assert torch.equal(part[0], whole[0][samples])
        assert torch.equal(part[1], whole[1][samples])


def test_larger_field_than_needed_changes_no_bit() -> None:
    """Samples share a batch that is as large as its largest field."""
    transform, batch = DeviceTransform(PRESETS["strong"], PATCH), raw_batch(16)
    small_shape = (34, 48, 56)
    small = RawBatch(
        spatial_resampling.crop_centre(batch.image_BCDHW, small_shape),
        spatial_resampling.crop_centre(batch.label_BDHW, small_shape),
        batch.intensity_BC4,
        batch.present_BC,
        batch.augment_seed_B,
    )
    fitting = []
    for i, seed in enumerate(batch.augment_seed_B.tolist()):
        shape = draw_augmentation(PRESETS["strong"], PATCH, seed).field_shape or PATCH
        if all(needed <= size for needed, size in zip(shape, small_shape, strict=True)):
            fitting.append(i)
    assert len(fitting) > 8
    for result, reference in zip(transform(small), transform(batch), strict=True):
        assert torch.equal(result[fitting], reference[fitting])


def test_number_of_threads_changes_no_bit() -> None:
    transform, batch = DeviceTransform(PRESETS["strong"], (32, 64, 64)), raw_batch(12, (40, 90, 90))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(transform(batch))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert torch.equal(other[1], results[0][1])


def test_seed_determines_the_result() -> None:
    transform, batch = DeviceTransform(PRESETS["nnunet"], PATCH), raw_batch(1)
    images = []
    for seed in (5, 5, 6):
        images.append(transform(replace(batch, augment_seed_B=torch.tensor([seed])))[0])
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


@pytest.mark.parametrize("augmentation", ["nnunet", "strong"])
@pytest.mark.parametrize("axes", ["", "x", "zy"])
def test_mirror_axes_change_mirroring_only(augmentation: AugmentationPreset, axes: str) -> None:
    preset = build_preset(DataConfig(augmentation=augmentation, mirror_axes=tuple(axes)))  # type: ignore[arg-type]
    allowed, mirrored = {"zyx".index(axis) for axis in axes}, set()
    for seed in range(100):
        parameters = dict(draw_augmentation(preset, PATCH, seed).parameters)
        reference = dict(draw_augmentation(PRESETS[augmentation], PATCH, seed).parameters)
        result_axes, all_axes = parameters.pop("mirror", ()), reference.pop("mirror", ())
        assert result_axes == tuple(axis for axis in all_axes if axis in allowed)
        assert repr(parameters) == repr(reference)
        mirrored |= set(result_axes)
    assert mirrored == allowed


def test_mirror_axes_with_preset_none_mirror_only() -> None:
    preset = build_preset(DataConfig(augmentation="none", mirror_axes=("x",)))
    assert preset == Preset(mirror=MirrorTransform((2,)))
    assert build_preset(DataConfig(augmentation="none")) == PRESETS["none"]


def test_mirroring_flips_image_and_label() -> None:
    preset = Preset(mirror=MirrorTransform((0, 1, 2)))
    batch = raw_batch(8, PATCH)
    image_BCDHW, label_BDHW = DeviceTransform(preset, PATCH)(batch)
    plain_image, plain_label = DeviceTransform(PRESETS["none"], PATCH)(batch)
    seen = set()
    for i, seed in enumerate(batch.augment_seed_B.tolist()):
        axes = draw_augmentation(preset, PATCH, seed).parameters.get("mirror", ())
        seen.add(axes)
        expected = np.flip(plain_image[i, 0].numpy(), axes)
        np.testing.assert_array_equal(image_BCDHW[i, 0].numpy(), expected)
        expected_label = np.flip(plain_label[i].numpy(), axes)
        np.testing.assert_array_equal(label_BDHW[i].numpy(), expected_label)
    assert len(seen) > 3


def test_ignored_labels_survive_every_preset() -> None:
    batch = raw_batch(8)
    batch.label_BDHW[:, :, 26:] = 255
    for preset in PRESETS.values():
        _, label_BDHW = DeviceTransform(preset, PATCH)(batch)
        assert set(label_BDHW.unique().tolist()) == {0, 1, 2, 255}
        share = (label_BDHW == 255).float().mean()
        assert 0.35 < share < 0.65


def test_descriptions_name_each_drawn_transform() -> None:
    for seed in range(40):
        draw = draw_augmentation(PRESETS["strong"], PATCH, seed)
        notes = describe_augmentation(PRESETS["strong"], draw)
        # A spatial transform has a note for each of rotation, scaling and deformation.
        assert len(notes) >= len(draw.parameters)
        assert bool(notes) == bool(draw.parameters)
