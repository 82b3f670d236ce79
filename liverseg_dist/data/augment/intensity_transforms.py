"""Intensity transforms of one normalised sample (float32, D H W), on whatever device it lies.

Definitions follow nnU-Net's batchgeneratorsv2 (https://github.com/MIC-DKFZ/batchgeneratorsv2), against which they are
tested. Means are taken axis by axis, so that their bits do not depend on the number of CPU threads.
"""

import numpy as np
import torch
import torch.nn.functional as F

from liverseg_dist.data.augment.spatial_transforms import along_axis
from liverseg_dist.labels import LIVER, TUMOUR
from liverseg_dist.volume import Float3, Index3

Tensor = torch.Tensor
_EPSILON = 1e-7
_BLUR_REACH_SIGMAS = 3.0
_SERIAL_VALUES = 2**14
"""Below torch's grain size for parallel loops."""


def add_noise(image: Tensor, sigma: float, seed: int) -> Tensor:
    """Gaussian noise; the same seed gives the same noise on the same kind of device."""
    generator = torch.Generator(device=image.device).manual_seed(seed)
    noise = torch.randn(image.shape, generator=generator, device=image.device, dtype=image.dtype)
    return image.add_(noise, alpha=sigma)


def gaussian_blur(image: Tensor, sigma_voxels: Float3) -> Tensor:
    """Gaussian blur with a sigma per axis (z, y, x), mirrored at the border without repeating the outer voxel."""
    for axis, sigma in enumerate(sigma_voxels):
        weights = torch.from_numpy(_blur_weights(sigma, image.shape[axis])).to(image.device)
        image = along_axis(image, weights, axis)
    return image


def _blur_weights(sigma: float, length: int) -> np.ndarray:
    """Matrix (length, length) of a truncated, normalised Gaussian."""
    reach = min(
        max(1, int(_BLUR_REACH_SIGMAS * sigma + 0.25)), length - 1
    )  # batchgeneratorsv2's kernel size
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    weights = np.zeros((length, length))
    period = max(1, 2 * (length - 1))
    for offset, value in zip(offsets, kernel, strict=True):
        source = np.abs(np.arange(length) + offset) % period
        source = np.where(source >= length, period - source, source)
        np.add.at(weights, (np.arange(length), source), value)
    return weights.astype(np.float32)


def scale_brightness(image: Tensor, factor: float) -> Tensor:
    return image.mul_(factor)


def scale_contrast(image: Tensor, factor: float) -> Tensor:
    """Stretch about the mean; the range of values stays."""
    mean = _mean(image)
    low, high = torch.aminmax(image)
    return image.sub_(mean).mul_(factor).add_(mean).clamp_(low, high)


def lower_resolution(image: Tensor, scale: float, *, in_plane_only: bool = False) -> Tensor:
    """Nearest-neighbour down to `scale` of the size, trilinear up again."""
    small = [
        size if in_plane_only and not axis else round(size * scale)
        for axis, size in enumerate(image.shape)
    ]
    down = F.interpolate(image[None, None], size=small, mode="nearest-exact")
    return F.interpolate(down, size=list(image.shape), mode="trilinear")[0, 0]


def thicken_slices(image: Tensor, thickness: float) -> Tensor:
    """What a scan with slices `thickness` times as thick would show: averages over z, linearly interpolated back."""
    return along_axis(
        image, torch.from_numpy(_thick_slice_weights(image.shape[0], thickness)).to(image.device), 0
    )


def _thick_slice_weights(length: int, thickness: float) -> np.ndarray:
    count = max(1, round(length / thickness))
    edges = np.linspace(0.0, length, count + 1)
    slices = np.arange(length)
    cover = np.minimum(edges[1:, None], slices + 1) - np.maximum(edges[:-1, None], slices)
    average = np.clip(cover, 0.0, None)
    average /= average.sum(axis=1, keepdims=True)
    place = np.clip((slices + 0.5) * count / length - 0.5, 0, count - 1)
    back = np.maximum(0.0, 1.0 - np.abs(place[:, None] - np.arange(count)))
    return (back @ average).astype(np.float32)


def change_gamma(image: Tensor, gamma: float, *, inverted: bool = False) -> Tensor:
    """((x - min) / range) ** gamma on the image or its negative; mean and standard deviation stay."""
    if inverted:
        image = image.neg_()
    mean, std = _mean_std(image)
    low, high = torch.aminmax(image)
    span = high - low
    image = _power(image.sub_(low).div_(span.clamp(min=_EPSILON)), gamma).mul_(span).add_(low)
    mean_now, std_now = _mean_std(image)
    image = image.sub_(mean_now).mul_(std / std_now.clamp(min=_EPSILON)).add_(mean)
    return image.neg_() if inverted else image


def _power(image: Tensor, exponent: float) -> Tensor:
    """In place. On a CPU in pieces that torch does not divide among threads: where it divides, the last bit changes."""
    for piece in image.view(-1).split(_SERIAL_VALUES) if image.device.type == "cpu" else (image,):
        piece.pow_(exponent)
    return image


def copy_tumours(
    image: Tensor, label: Tensor, flipped_axes: tuple[int, ...], shift: Index3
) -> tuple[Tensor, Tensor]:
    """Show the patch's tumours a second time: turned over, moved, and pasted where the liver is (new tensors).

    Copy-paste (Ghiasi et al. 2021, https://arxiv.org/abs/2012.07177) within one scan, so that noise, contrast phase and
    resolution fit. What would stick out of the liver is left out; the image fades in over one voxel at the rim.
    """
    lesion = (label == TUMOUR).flip(flipped_axes) if flipped_axes else label == TUMOUR
    pasted = _moved(lesion, shift) & (label == LIVER)
    source = _moved(image.flip(flipped_axes) if flipped_axes else image, shift)
    inside = F.avg_pool3d(
        pasted[None, None].to(image.dtype), 3, stride=1, padding=1, count_include_pad=True
    )[0, 0]
    weight = torch.where(pasted, inside, torch.zeros_like(inside))
    return image + weight * (source - image), torch.where(
        pasted, torch.full_like(label, TUMOUR), label
    )


def _moved(volume: Tensor, shift: Index3) -> Tensor:
    """Voxel p goes to p + shift; what comes in is zero, what leaves is lost."""
    out = torch.zeros_like(volume)
    into = tuple(slice(max(0, s), n + min(0, s)) for s, n in zip(shift, volume.shape, strict=True))
    of = tuple(slice(max(0, -s), n + min(0, -s)) for s, n in zip(shift, volume.shape, strict=True))
    out[into] = volume[of]
    return out


def shift_enhancement(image: Tensor, label: Tensor, liver: float, tumour: float) -> Tensor:
    """Contrast-phase shift: add one amount to the liver's parenchyma and another to its tumours."""
    return image.add_(label == LIVER, alpha=liver).add_(label == TUMOUR, alpha=tumour)


def _mean(image: Tensor) -> Tensor:
    return image.mean(-1).mean(-1).mean()


def _mean_std(image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and the unbiased standard deviation."""
    mean = _mean(image)
    variance = _mean((image - mean).square_()) * (image.numel() / max(1, image.numel() - 1))
    return mean, variance.sqrt_()
