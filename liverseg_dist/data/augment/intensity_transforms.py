"""Intensity transforms of the channels of a normalised sample (float32, D H W).

The functions follow nnU-Net's batchgeneratorsv2 (https://github.com/MIC-DKFZ/batchgeneratorsv2) and
are tested against it. Means are computed axis by axis, so that their bits do not depend on the
number of CPU threads. Each class is one transform; the function of the same purpose does the work.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from liverseg_dist.data.augment.channel_transforms import ChannelTransform
from liverseg_dist.data.augment.host_tables import NO_TABLES, DeviceTables, TableKey
from liverseg_dist.data.augment.spatial_resampling import multiply_axis
from liverseg_dist.data.augment.transform import (
    Range,
    SampleContext,
    draw_balanced_value,
    draw_value,
)
from liverseg_dist.data.counter_random import CounterRandom
from liverseg_dist.volume import Float3

Tensor = torch.Tensor
_EPSILON = 1e-7
_BLUR_REACH_SIGMAS = 3.0
_SERIAL_VALUES = 2**14
"""Below torch's grain size for parallel loops."""


@dataclass(frozen=True)
class NoiseTransform(ChannelTransform):
    """Additive Gaussian noise."""

    sigma: Range = (0.0, 0.1)
    """In standard deviations of the normalised image."""

    def draw(self, random: CounterRandom, context: SampleContext) -> tuple[float, ...] | None:
        # As in nnU-Net, all channels have noise of one strength.
        sigma = self.draw_channel(random, self.probability)
        return None if sigma is None else (sigma,) * context.channels

    def draw_channel(self, random: CounterRandom, probability: float) -> float | None:
        return draw_value(random, probability, self.sigma)

    def apply_channel(
        self, image_DHW: Tensor, parameters: float, context: SampleContext, seed: int
    ) -> Tensor:
        return add_noise(image_DHW, parameters, seed)

    def describe_channel(self, parameters: float) -> str:
        return f"noise {parameters:.2f}"


@dataclass(frozen=True)
class BlurTransform(ChannelTransform):
    """Gaussian blur with a sigma for each axis."""

    sigma_voxels: Range = (0.5, 1.0)

    @property
    def p_per_channel(self) -> float:
        # nnU-Net's.
        return 0.5

    def draw_channel(self, random: CounterRandom, probability: float) -> Float3 | None:
        sigma_z = draw_value(random, probability, self.sigma_voxels)
        if sigma_z is None:
            return None
        sigma_y = random.draw_uniform(*self.sigma_voxels)
        return sigma_z, sigma_y, random.draw_uniform(*self.sigma_voxels)

    def apply_channel(
        self, image_DHW: Tensor, parameters: Float3, context: SampleContext, seed: int
    ) -> Tensor:
        return blur_gaussian(image_DHW, parameters, context.tables)

    def list_channel_tables(self, parameters: Float3, context: SampleContext) -> list[TableKey]:
        keys: list[TableKey] = []
        for sigma, length in zip(parameters, context.patch_size, strict=True):
            keys.append((_blur_weights, (sigma, length)))
        return keys

    def describe_channel(self, parameters: Float3) -> str:
        return f"blur {max(parameters):.2f}"


@dataclass(frozen=True)
class BrightnessTransform(ChannelTransform):
    """Multiplication by a factor; half of the factors are below 1."""

    factor: Range = (0.75, 1.25)

    def draw_channel(self, random: CounterRandom, probability: float) -> float | None:
        return draw_balanced_value(random, probability, self.factor)

    def apply_channel(
        self, image_DHW: Tensor, parameters: float, context: SampleContext, seed: int
    ) -> Tensor:
        return scale_brightness(image_DHW, parameters)

    def describe_channel(self, parameters: float) -> str:
        return f"brightness {parameters:.2f}"


@dataclass(frozen=True)
class ContrastTransform(ChannelTransform):
    """Stretching about the mean; half of the factors are below 1."""

    factor: Range = (0.75, 1.25)

    def draw_channel(self, random: CounterRandom, probability: float) -> float | None:
        return draw_balanced_value(random, probability, self.factor)

    def apply_channel(
        self, image_DHW: Tensor, parameters: float, context: SampleContext, seed: int
    ) -> Tensor:
        return scale_contrast(image_DHW, parameters)

    def describe_channel(self, parameters: float) -> str:
        return f"contrast {parameters:.2f}"


@dataclass(frozen=True)
class LowResolutionTransform(ChannelTransform):
    """Simulation of a lower resolution; in plane only for anisotropic patches."""

    scale: Range = (0.5, 1.0)

    @property
    def p_per_channel(self) -> float:
        # nnU-Net's.
        return 0.5

    def draw_channel(self, random: CounterRandom, probability: float) -> float | None:
        return draw_value(random, probability, self.scale)

    def apply_channel(
        self, image_DHW: Tensor, parameters: float, context: SampleContext, seed: int
    ) -> Tensor:
        return lower_resolution(image_DHW, parameters, in_plane_only=context.is_anisotropic)

    def describe_channel(self, parameters: float) -> str:
        return f"resolution {parameters:.2f}"


@dataclass(frozen=True)
class ThickSlicesTransform(ChannelTransform):
    """Simulation of thicker slices: neighbours along z are averaged."""

    thickness: Range = (1.5, 3.0)
    """In slices."""

    def draw_channel(self, random: CounterRandom, probability: float) -> float | None:
        return draw_value(random, probability, self.thickness)

    def apply_channel(
        self, image_DHW: Tensor, parameters: float, context: SampleContext, seed: int
    ) -> Tensor:
        return thicken_slices(image_DHW, parameters, context.tables)

    def list_channel_tables(self, parameters: float, context: SampleContext) -> list[TableKey]:
        return [(_thick_slice_weights, (context.patch_size[0], parameters))]

    def describe_channel(self, parameters: float) -> str:
        return f"slices thicker by {parameters:.2f}"


@dataclass(frozen=True)
class GammaTransform(ChannelTransform):
    """Gamma correction of the image, or of its negative; half of the exponents are below 1."""

    gamma: Range = (0.7, 1.5)
    is_inverted: bool = False

    def draw_channel(self, random: CounterRandom, probability: float) -> float | None:
        return draw_balanced_value(random, probability, self.gamma)

    def apply_channel(
        self, image_DHW: Tensor, parameters: float, context: SampleContext, seed: int
    ) -> Tensor:
        return change_gamma(image_DHW, parameters, inverted=self.is_inverted)

    def describe_channel(self, parameters: float) -> str:
        return f"{'inverted ' if self.is_inverted else ''}gamma {parameters:.2f}"


def add_noise(image: Tensor, sigma: float, seed: int) -> Tensor:
    """Add Gaussian noise in place; one seed gives one noise on one kind of device."""
    # A generator of its own, so that the noise depends neither on other samples nor on PyTorch's
    # global state.
    generator = torch.Generator(device=image.device).manual_seed(seed)
    noise = torch.randn(image.shape, generator=generator, device=image.device, dtype=image.dtype)
    return image.add_(noise, alpha=sigma)


def blur_gaussian(image: Tensor, sigma_voxels: Float3, tables: DeviceTables = NO_TABLES) -> Tensor:
    """Blur with a sigma per axis (z, y, x).

    The image is mirrored at its border without repetition of the outer voxel.
    """
    for axis, sigma in enumerate(sigma_voxels):
        weights = tables.get_table(image.device, _blur_weights, sigma, image.shape[axis])
        image = multiply_axis(image, weights, axis)
    return image


def _blur_weights(sigma: float, length: int) -> np.ndarray:
    """Return the matrix (length, length) of a truncated, normalised Gaussian."""
    # The kernel size of batchgeneratorsv2.
    reach = min(max(1, int(_BLUR_REACH_SIGMAS * sigma + 0.25)), length - 1)
    # The kernel is normalised after the truncation, so that a constant image stays constant.
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    weights = np.zeros((length, length))
    # Reflection about the outer voxels repeats with this period.
    period = max(1, 2 * (length - 1))
    for offset, value in zip(offsets, kernel, strict=True):
        source = np.abs(np.arange(length) + offset) % period
        source = np.where(source >= length, period - source, source)
        np.add.at(weights, (np.arange(length), source), value)
    return weights.astype(np.float32)


def scale_brightness(image: Tensor, factor: float) -> Tensor:
    """Multiply by a factor in place."""
    return image.mul_(factor)


def scale_contrast(image: Tensor, factor: float) -> Tensor:
    """Stretch about the mean in place; the range of values does not change."""
    mean = _compute_mean(image)
    low, high = torch.aminmax(image)
    # Without the clamp, noise in air would exceed the range that the network knows.
    return image.sub_(mean).mul_(factor).add_(mean).clamp_(low, high)


def lower_resolution(image: Tensor, scale: float, *, in_plane_only: bool = False) -> Tensor:
    """Reduce to `scale` of the size (nearest neighbour), then enlarge again (trilinear)."""
    small = [round(size * scale) for size in image.shape]
    if in_plane_only:
        small[0] = image.shape[0]
    down = F.interpolate(image[None, None], size=small, mode="nearest-exact")
    return F.interpolate(down, size=list(image.shape), mode="trilinear")[0, 0]


def thicken_slices(image: Tensor, thickness: float, tables: DeviceTables = NO_TABLES) -> Tensor:
    """Simulate slices that are `thickness` times as thick.

    Slices are averaged along z, then interpolated linearly back to the same number of slices.
    """
    weights = tables.get_table(image.device, _thick_slice_weights, image.shape[0], thickness)
    return multiply_axis(image, weights, 0)


def _thick_slice_weights(length: int, thickness: float) -> np.ndarray:
    count = max(1, round(length / thickness))
    edges = np.linspace(0.0, length, count + 1)
    slices = np.arange(length)
    # A thick slice averages the thin ones by the length of their overlap.
    overlap = np.minimum(edges[1:, None], slices + 1) - np.maximum(edges[:-1, None], slices)
    average = np.clip(overlap, 0.0, None)
    average /= average.sum(axis=1, keepdims=True)
    position = np.clip((slices + 0.5) * count / length - 0.5, 0, count - 1)
    interpolation = np.maximum(0.0, 1.0 - np.abs(position[:, None] - np.arange(count)))
    return (interpolation @ average).astype(np.float32)


def change_gamma(image: Tensor, gamma: float, *, inverted: bool = False) -> Tensor:
    """Apply ((x - min) / range) ** gamma to the image or its negative, in place.

    The mean and the standard deviation do not change.
    """
    # The negative makes gamma change the contrast of bright tissue instead of dark tissue.
    if inverted:
        image = image.neg_()
    mean, std = _compute_mean_and_std(image)
    low, high = torch.aminmax(image)
    span = high - low
    unit = image.sub_(low).div_(span.clamp(min=_EPSILON))
    image = _raise_to_power(unit, gamma).mul_(span).add_(low)
    new_mean, new_std = _compute_mean_and_std(image)
    image = image.sub_(new_mean).mul_(std / new_std.clamp(min=_EPSILON)).add_(mean)
    return image.neg_() if inverted else image


def _raise_to_power(image: Tensor, exponent: float) -> Tensor:
    """Raise to a power in place."""
    if image.device.type != "cpu":
        return image.pow_(exponent)
    # Pieces that torch does not divide among threads: a division changes the last bit.
    for piece in image.view(-1).split(_SERIAL_VALUES):
        piece.pow_(exponent)
    return image


def _compute_mean(image: Tensor) -> Tensor:
    return image.mean(-1).mean(-1).mean()


def _compute_mean_and_std(image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the unbiased standard deviation."""
    mean = _compute_mean(image)
    bias = image.numel() / max(1, image.numel() - 1)
    variance = _compute_mean((image - mean).square_()) * bias
    return mean, variance.sqrt_()
