"""Every transform against a named reference (batchgeneratorsv2, scipy, numpy, MONAI) with equal parameters."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

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
from liverseg_dist.data.augment import (
    PRESETS,
    DeviceTransform,
    Preset,
    augmentation_preset,
    draw_augmentation,
    intensity_transforms,
    normalise_intensity,
    spatial_transforms,
)
from liverseg_dist.data.augment.presets import AugmentDraw, PresetName, SpatialDraw, rotation_matrix

PATCH = (12, 20, 24)
OUTSIDE = -1.5


def volume(shape: tuple[int, int, int] = PATCH, seed: int = 0) -> torch.Tensor:
    """Smooth and rough parts, as in CT."""
    rough = np.random.default_rng(seed).normal(size=shape)
    return torch.from_numpy(
        (ndimage.gaussian_filter(rough, 2) * 8 + rough * 0.2).astype(np.float32)
    )


def labels(shape: tuple[int, int, int] = PATCH) -> torch.Tensor:
    smooth = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=shape), 2)
    return torch.from_numpy(np.digitize(smooth, np.quantile(smooth, [0.6, 0.9])).astype(np.uint8))


def close(ours: torch.Tensor, reference: object, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(ours.numpy(), np.asarray(reference), rtol=0, atol=tolerance)


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
    image, label = volume(field_shape), labels(field_shape)
    draw = SpatialDraw(rotation_matrix(angles) @ np.diag(scaling), any(angles), None)
    ours, our_label = spatial_transforms.resample_patch(image.clone(), label, draw, PATCH, OUTSIDE)
    theirs = SpatialTransform(
        PATCH, 0, random_crop=False, p_rotation=1, rotation=lambda image, dim: angles[dim],
        p_scaling=1, scaling=lambda image, dim: scaling[dim], p_synchronize_scaling_across_axes=-1,
        mode_seg="nearest", border_mode_seg="constant", padding_value_seg=255,
        padding_mode_image="constant", padding_value_image=OUTSIDE,
    )  # fmt: skip
    expected = theirs(image=image[None].clone(), segmentation=label[None].to(torch.int16))
    close(ours, expected["image"][0], 1e-4)
    agree = (our_label.numpy() == expected["segmentation"][0].numpy()).mean()
    assert agree > 0.9995, "only a point half-way between two voxels may fall either way"


def test_rotation_and_scaling_against_scipy_and_monai() -> None:
    image = volume((16, 32, 32))
    matrix = rotation_matrix((0.3, 0.1, -0.2)) @ np.diag((0.9, 1.0, 0.8))
    draw = SpatialDraw(matrix, True, None)
    ours, _ = spatial_transforms.resample_patch(
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
    close(ours, scipys, 1e-4)
    homogeneous = np.eye(4)
    homogeneous[:3, :3] = matrix
    monais, _ = MonaiAffine(affine=homogeneous, spatial_size=PATCH, padding_mode="zeros")(
        image[None]
    )
    close(ours, np.asarray(monais)[0], 1e-4)


@pytest.mark.parametrize("scaling", [(0.83, 0.83, 0.83), (1.31, 1.31, 1.31), (1.0, 0.72, 1.4)])
def test_separable_scaling_equals_the_grid(scaling: tuple) -> None:
    field_shape = (14, 24, 28)
    image, label = volume(field_shape), labels(field_shape)
    draw = SpatialDraw(np.diag(scaling), False, None)
    ours, our_label = spatial_transforms.resample_patch(image.clone(), label, draw, PATCH, OUTSIDE)
    grids, grid_label = spatial_transforms.resample_patch(
        image.clone(), label, replace(draw, rotates=True), PATCH, OUTSIDE
    )
    close(ours, grids)
    assert (our_label == grid_label).float().mean() > 0.999


def test_elastic_against_scipy() -> None:
    control = np.random.default_rng(3).uniform(-3, 3, (3, 4, 5, 5))
    field = spatial_transforms.displacement_field(control, PATCH, torch.device("cpu"))
    knots = [
        np.linspace(1.0, count - 2.0, size)
        for count, size in zip(control.shape[1:], PATCH, strict=True)
    ]
    places = np.meshgrid(*knots, indexing="ij")
    expected = [ndimage.map_coordinates(c, places, order=3, prefilter=False) for c in control]
    close(field, expected)
    image = volume((20, 30, 34))
    matrix = rotation_matrix((0.0, 0.2, 0.1))
    draw = SpatialDraw(matrix, True, control)
    ours, _ = spatial_transforms.resample_patch(
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
    close(ours, scipys, 1e-4)


def test_ignored_voxels_survive_and_the_outside_is_ignored() -> None:
    label = torch.full((12, 20, 24), 1, dtype=torch.uint8)
    label[:, :, :6] = 255
    image = torch.zeros(label.shape)
    for draw in (
        SpatialDraw(np.eye(3) * 1.2, False, None),
        SpatialDraw(rotation_matrix((0.5, 0, 0)) * 1.2, True, None),
    ):
        moved, out = spatial_transforms.resample_patch(image.clone(), label, draw, PATCH, OUTSIDE)
        assert set(out.unique().tolist()) == {1, 255}
        assert out[0, 0, 0] == 255
        assert moved[0, 0, -1].item() == pytest.approx(OUTSIDE)
        assert moved[6, 10, 12].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("preset", ["nnunet", "strong"])
def test_the_field_holds_all_that_is_looked_at(preset: str) -> None:
    """A larger surrounding changes nothing, a smaller one does."""
    drawn = [draw_augmentation(PRESETS[preset], PATCH, seed) for seed in range(120)]
    for draw in [d for d in drawn if d.spatial and d.field_shape != PATCH][:12]:
        assert draw.spatial is not None
        assert draw.field_shape is not None
        large = tuple(n + 20 for n in draw.field_shape)
        image, label = volume(large), labels(large)
        full = spatial_transforms.resample_patch(image.clone(), label, draw.spatial, PATCH, OUTSIDE)

        def cut(
            less: int,
            image: torch.Tensor = image,
            label: torch.Tensor = label,
            draw: AugmentDraw = draw,
        ) -> tuple:
            assert draw.field_shape is not None
            assert draw.spatial is not None
            shape = tuple(n - less for n in draw.field_shape)
            views = (spatial_transforms.centre_crop(v, shape) for v in (image, label))
            return spatial_transforms.resample_patch(*views, draw.spatial, PATCH, OUTSIDE)

        close(cut(0)[0], full[0], 1e-4)
        assert (cut(0)[1] == full[1]).float().mean() > 0.999
        if draw.spatial.control_displacement is None:  # its reach is only known from above
            assert (cut(4)[0] - full[0]).abs().max() > 0.01


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
    for ours, theirs in pairs:
        image = volume()
        close(ours(image.clone()), theirs(image=image[None].clone())["image"][0])  # type: ignore[operator]


def test_gamma_of_a_constant_image_stays_finite() -> None:
    for inverted in (False, True):
        out = intensity_transforms.change_gamma(torch.full(PATCH, -1.5), 0.7, inverted=inverted)
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("sigma", [(0.5, 0.5, 0.5), (0.6, 0.75, 1.0), (0.95, 0.8, 0.55)])
def test_blur_against_batchgenerators_and_scipy(sigma: tuple) -> None:
    image = volume()
    ours = intensity_transforms.gaussian_blur(image.clone(), sigma)
    theirs = GaussianBlurTransform(lambda shape, dim: sigma[dim - 1], False, False, 1)(
        image=image[None].clone()
    )
    close(ours, theirs["image"][0])
    radius = [int(3 * s + 0.25) for s in sigma]
    close(
        ours,
        ndimage.gaussian_filter(
            image.numpy().astype(np.float64), sigma, mode="mirror", radius=radius
        ),
    )


@pytest.mark.parametrize("in_plane_only", [False, True])
def test_low_resolution_against_batchgenerators(in_plane_only: bool) -> None:
    image = volume()
    ours = intensity_transforms.lower_resolution(image.clone(), 0.6, in_plane_only=in_plane_only)
    theirs = SimulateLowResolutionTransform(0.6, False, True, (0,) if in_plane_only else None)
    close(ours, theirs(image=image[None].clone())["image"][0])


def test_noise_is_normal_and_a_function_of_the_seed() -> None:
    noise = [intensity_transforms.add_noise(torch.zeros(PATCH), 0.1, seed) for seed in (1, 1, 2)]
    assert torch.equal(noise[0], noise[1])
    assert abs(np.corrcoef(noise[0].ravel(), noise[2].ravel())[0, 1]) < 0.05
    assert stats.kstest(noise[0].ravel().numpy(), stats.norm(0, 0.1).cdf).pvalue > 0.01


def test_thick_slices_against_numpy() -> None:
    image = volume()
    averaged = image.numpy().reshape(6, 2, 20, 24).mean(1)
    centres = np.arange(6) * 2 + 0.5
    expected = np.apply_along_axis(
        lambda line: np.interp(np.arange(12), centres, line), 0, averaged
    )
    close(intensity_transforms.thicken_slices(image, 2.0), expected)
    flat = torch.full(PATCH, 0.7)
    for thickness in (1.5, 2.3, 3.0, 40.0):
        close(intensity_transforms.thicken_slices(flat, thickness), flat)


def test_enhancement_changes_liver_and_tumour_apart() -> None:
    image, label = volume(), labels()
    expected = image.numpy() + np.select([label.numpy() == 1, label.numpy() == 2], [0.2, -0.1], 0.0)
    close(intensity_transforms.shift_enhancement(image.clone(), label, 0.2, -0.1), expected)


@pytest.mark.parametrize(
    ("flipped", "shift"),
    [((), (0, 9, -7)), ((2,), (-3, 0, 5)), ((0, 1, 2), (2, -4, 11)), ((), (0, 0, 0))],
)
def test_copied_tumours_against_scipy(
    flipped: tuple[int, ...], shift: tuple[int, int, int]
) -> None:
    image, label = volume(), labels()
    before = image.clone(), label.clone()
    pasted, marked = intensity_transforms.copy_tumours(image, label, flipped, shift)
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
    close(pasted, image.numpy() + fade * (moved_image - image.numpy()))
    np.testing.assert_array_equal(marked.numpy(), np.where(where, 2, label.numpy()))


def test_tumours_are_copied_as_often_as_the_preset_says_and_other_draws_stay() -> None:
    strong, without = PRESETS["strong"], replace(PRESETS["strong"], p_tumour_copy=0.0)
    draws = [draw_augmentation(strong, (64, 128, 128), seed) for seed in range(1000)]
    copies = [draw.tumour_copy for draw in draws if draw.tumour_copy is not None]
    assert frequency_is(len(copies), len(draws), 0.2)
    shifts = np.abs([copy.shift for copy in copies])
    assert (shifts <= (16, 32, 32)).all()
    assert (shifts.max(axis=0) > (13, 28, 28)).all()
    for seed in range(50):
        assert repr(replace(draws[seed], tumour_copy=None)) == repr(
            draw_augmentation(without, (64, 128, 128), seed)
        )


# --- presets ------------------------------------------------------------------------------------------------------


def frequency_is(hits: int, count: int, probability: float) -> bool:
    return stats.binomtest(hits, count, probability).pvalue > 0.001


def test_nnunet_preset_draws_with_nnunets_probabilities_and_ranges() -> None:
    count = 3000
    draws = [draw_augmentation(PRESETS["nnunet"], (64, 128, 128), seed) for seed in range(count)]

    def of(name: str) -> list:
        return [getattr(d, name) for d in draws if getattr(d, name) is not None]

    turned = [d.spatial for d in draws if d.spatial]
    assert frequency_is(len(turned), count, 1 - 0.8 * 0.8)
    assert frequency_is(sum(s.rotates for s in turned), count, 0.2)
    expected = {
        "noise_sigma": (0.1, 0, 0.1),
        "blur_sigma_voxels": (0.2 * 0.5, 0.5, 1.0),
        "brightness": (0.15, 0.75, 1.25),
        "contrast": (0.15, 0.75, 1.25),
        "low_resolution": (0.25 * 0.5, 0.5, 1.0),
        "inverted_gamma": (0.1, 0.7, 1.5),
        "gamma": (0.3, 0.7, 1.5),
    }
    for name, (probability, low, high) in expected.items():
        values = np.array(of(name))
        assert frequency_is(len(values), count, probability), name
        assert low <= values.min() < low + 0.1 * (high - low), name
        assert high - 0.1 * (high - low) < values.max() <= high, name
    for name in ("brightness", "contrast", "gamma"):  # half below 1, half above, whatever the range
        values = np.array(of(name))
        assert frequency_is(int((values < 1).sum()), len(values), 0.5), name
    for axis in range(3):
        assert frequency_is(sum(axis in d.mirrored_axes for d in draws), count, 0.5)
    assert of("slice_thickness") == []
    assert of("enhancement") == []


def test_nnunet_rotations_and_scalings() -> None:
    draws = [draw_augmentation(PRESETS["nnunet"], (64, 128, 128), seed) for seed in range(3000)]
    matrices = [d.spatial.matrix for d in draws if d.spatial]
    scales = np.array([np.linalg.svd(m, compute_uv=False) for m in matrices])
    assert np.ptp(scales, axis=1).max() < 1e-9, "one scale for all axes"
    drawn = scales[np.abs(scales[:, 0] - 1) > 1e-9, 0]
    assert 0.7 <= drawn.min() < 0.75
    assert 1.35 < drawn.max() <= 1.4
    angles = np.array(
        [np.arcsin(-m[2, 0] / s[0]) for m, s in zip(matrices, scales, strict=True)]
    )  # about y
    assert math.radians(25) < np.abs(angles).max() <= math.radians(30) + 1e-9


def test_anisotropic_patches_turn_in_plane_only() -> None:
    for preset in ("nnunet", "strong"):
        draws = [draw_augmentation(PRESETS[preset], (20, 96, 96), seed) for seed in range(600)]
        spatials = [d.spatial for d in draws if d.spatial]
        assert all(d.in_plane_only for d in draws)
        for s in spatials:
            np.testing.assert_array_equal(s.matrix[0], [1, 0, 0])
            np.testing.assert_array_equal(s.matrix[:, 0], [1, 0, 0])
        turns = [math.atan2(s.matrix[2, 1], s.matrix[1, 1]) for s in spatials if s.rotates]
        assert max(map(abs, turns)) > math.radians(120), "any angle in plane"
    assert not draw_augmentation(PRESETS["nnunet"], (32, 96, 96), 0).in_plane_only


# --- the whole ----------------------------------------------------------------------------------------------------


@dataclass
class RawBatch:
    image_BCDHW: torch.Tensor
    label_BDHW: torch.Tensor
    intensity_B4: torch.Tensor
    augment_seed_B: torch.Tensor

    def part(self, samples: list[int]) -> "RawBatch":
        return RawBatch(*(tensor[samples] for tensor in vars(self).values()))


def raw_batch(count: int = 6, shape: tuple[int, int, int] = (36, 52, 60)) -> RawBatch:
    image = torch.stack([volume(shape, seed) * 90 + 60 for seed in range(count)])[:, None].to(
        torch.int16
    )
    statistics = torch.tensor([[-100.0, 240.0, 0.55, 0.2]] * count)
    return RawBatch(
        image, torch.stack([labels(shape)] * count), statistics, torch.arange(40, 40 + count)
    )


def test_without_augmentation_it_normalises_as_numpy_does() -> None:
    batch = raw_batch(2, PATCH)
    image_BCDHW, label_BDHW = DeviceTransform(PRESETS["none"], PATCH)(batch)
    v = (np.clip(batch.image_BCDHW.numpy().astype(np.float64), -100, 240) + 100) / 340
    close(image_BCDHW, (v - 0.55) / 0.2)
    assert image_BCDHW.dtype == torch.float32
    assert torch.equal(label_BDHW, batch.label_BDHW)
    close(
        normalise_intensity(
            torch.tensor([-500, -100, 240, 900], dtype=torch.int16), -100, 240, 0.5, 0.25
        ),
        [-2, -2, 2, 2],
    )


@pytest.mark.parametrize("preset", ["light", "nnunet", "strong"])
def test_a_sample_does_not_depend_on_its_batch(preset: str) -> None:
    transform, batch = DeviceTransform(PRESETS[preset], PATCH), raw_batch(16)  # type: ignore[index]
    together = transform(batch)
    assert torch.isfinite(together[0]).all()
    for samples in ([3], [5, 0], [7, 15, 2, 1]):
        alone = transform(batch.part(samples))
        assert torch.equal(alone[0], together[0][samples])
        assert torch.equal(alone[1], together[1][samples])


def test_a_larger_surrounding_than_needed_changes_no_bit() -> None:
    """Samples share a batch as large as its largest field."""
    transform, batch = DeviceTransform(PRESETS["strong"], PATCH), raw_batch(16)
    small = RawBatch(
        spatial_transforms.centre_crop(batch.image_BCDHW, (34, 48, 56)),
        spatial_transforms.centre_crop(batch.label_BDHW, (34, 48, 56)),
        batch.intensity_B4,
        batch.augment_seed_B,
    )
    seeds = batch.augment_seed_B.tolist()
    shapes = [
        draw_augmentation(PRESETS["strong"], PATCH, seed).field_shape or PATCH for seed in seeds
    ]
    fits = [
        i for i, s in enumerate(shapes) if all(a <= b for a, b in zip(s, (34, 48, 56), strict=True))
    ]
    assert len(fits) > 8
    for ours, theirs in zip(transform(small), transform(batch), strict=True):
        assert torch.equal(ours[fits], theirs[fits])


def test_the_number_of_threads_changes_no_bit() -> None:
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


def test_seed_decides() -> None:
    transform, batch = DeviceTransform(PRESETS["nnunet"], PATCH), raw_batch(1)
    same = [transform(replace(batch, augment_seed_B=torch.tensor([s])))[0] for s in (5, 5, 6)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


@pytest.mark.parametrize("augmentation", ["nnunet", "strong"])
@pytest.mark.parametrize("axes", ["", "x", "zy"])
def test_mirror_axes_change_mirroring_alone(augmentation: PresetName, axes: str) -> None:
    preset = augmentation_preset(DataConfig(augmentation=augmentation, mirror_axes=tuple(axes)))  # type: ignore[arg-type]
    wanted, mirrored = {"zyx".index(axis) for axis in axes}, set()
    for seed in range(100):
        draw, usual = (
            draw_augmentation(which, PATCH, seed) for which in (preset, PRESETS[augmentation])
        )
        assert draw.mirrored_axes == tuple(axis for axis in usual.mirrored_axes if axis in wanted)
        assert draw.enhancement == usual.enhancement
        assert draw.tumour_copy == usual.tumour_copy
        mirrored |= set(draw.mirrored_axes)
    assert mirrored == wanted


def test_mirror_axes_of_their_own_mirror_without_any_other_augmentation() -> None:
    assert augmentation_preset(DataConfig(augmentation="none", mirror_axes=("x",))) == Preset(
        mirror_axes=(2,)
    )
    assert augmentation_preset(DataConfig(augmentation="none")) == PRESETS["none"]


def test_mirroring_flips_image_and_label_alike() -> None:
    preset = Preset(mirror_axes=(0, 1, 2))
    batch = raw_batch(8, PATCH)
    image_BCDHW, label_BDHW = DeviceTransform(preset, PATCH)(batch)
    plain = DeviceTransform(PRESETS["none"], PATCH)(batch)
    seen = set()
    for i, seed in enumerate(batch.augment_seed_B.tolist()):
        axes = draw_augmentation(preset, PATCH, seed).mirrored_axes
        seen.add(axes)
        np.testing.assert_array_equal(
            image_BCDHW[i, 0].numpy(), np.flip(plain[0][i, 0].numpy(), axes)
        )
        np.testing.assert_array_equal(label_BDHW[i].numpy(), np.flip(plain[1][i].numpy(), axes))
    assert len(seen) > 3


def test_ignored_labels_come_through_every_preset() -> None:
    batch = raw_batch(8)
    batch.label_BDHW[:, :, 26:] = 255
    for preset in PRESETS:
        _, label_BDHW = DeviceTransform(PRESETS[preset], PATCH)(batch)
        assert set(label_BDHW.unique().tolist()) == {0, 1, 2, 255}
        share = (label_BDHW == 255).float().mean()
        assert 0.35 < share < 0.65
