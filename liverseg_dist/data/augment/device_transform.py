"""`DeviceTransform`: normalisation and augmentation of a batch where it lies, each sample by its own seed.

A sample's result depends on its voxels and its seed alone: samples are worked on one by one, so neither the batch it
shares nor the number of ranks can change a bit of it (on one kind of device). A transform that a sample does not draw
costs nothing. Order: spatial, tumour copies, contrast phase, thick slices, noise, blur, brightness, contrast, low
resolution, inverted gamma, gamma, mirror; the ones nnU-Net has in nnU-Net's order.
"""

from typing import Protocol

import torch

from liverseg_dist.data.augment.intensity_transforms import (
    add_noise,
    change_gamma,
    copy_tumours,
    gaussian_blur,
    lower_resolution,
    scale_brightness,
    scale_contrast,
    shift_enhancement,
    thicken_slices,
)
from liverseg_dist.data.augment.presets import AugmentDraw, Preset, draw_augmentation
from liverseg_dist.data.augment.spatial_transforms import centre_crop, resample_patch
from liverseg_dist.volume import Index3

Tensor = torch.Tensor


class AugmentableBatch(Protocol):
    @property
    def image_BCDHW(self) -> Tensor: ...
    @property
    def label_BDHW(self) -> Tensor: ...
    @property
    def intensity_B4(self) -> Tensor: ...
    @property
    def augment_seed_B(self) -> Tensor: ...


class DeviceTransform:
    """`(image_BCDHW float32 normalised, label_BDHW uint8) = transform(batch)`, on the batch's device.

    The batch's image (int16 HU, one channel) may be larger than `patch_size` around the same centre; what comes out has
    `patch_size`.
    """

    def __init__(self, preset: Preset, patch_size: Index3) -> None:
        self._preset = preset
        self.patch_size = patch_size

    @torch.no_grad()
    def __call__(self, batch: AugmentableBatch) -> tuple[Tensor, Tensor]:
        hu_BCDHW, label_BDHW = batch.image_BCDHW, batch.label_BDHW
        count, device = hu_BCDHW.shape[0], hu_BCDHW.device
        image_out = torch.empty((count, 1, *self.patch_size), dtype=torch.float32, device=device)
        label_out = torch.empty((count, *self.patch_size), dtype=torch.uint8, device=device)
        seeds, intensities = batch.augment_seed_B.tolist(), batch.intensity_B4.tolist()
        for i in range(count):
            draw = draw_augmentation(self._preset, self.patch_size, seeds[i])
            image, label = self._field(hu_BCDHW[i, 0], label_BDHW[i], draw, intensities[i])
            if draw.tumour_copy is not None:
                image, label = copy_tumours(
                    image, label, draw.tumour_copy.flipped_axes, draw.tumour_copy.shift
                )
            image = _augment_intensity(image, label, draw, seeds[i])
            if draw.mirrored_axes:
                image, label = image.flip(draw.mirrored_axes), label.flip(draw.mirrored_axes)
            image_out[i, 0], label_out[i] = image, label
        return image_out, label_out

    def _field(
        self, hu_DHW: Tensor, label_DHW: Tensor, draw: AugmentDraw, statistics: list[float]
    ) -> tuple[Tensor, Tensor]:
        """Normalised patch and its label, after the spatial transform."""
        lower_hu, upper_hu, mean, std = statistics
        shape = draw.field_shape if draw.field_shape is not None else self.patch_size
        label = centre_crop(label_DHW, shape)
        image = normalise_intensity(centre_crop(hu_DHW, shape), lower_hu, upper_hu, mean, std)
        if draw.spatial is None:
            return image, label
        return resample_patch(image, label, draw.spatial, self.patch_size, outside=-mean / std)


def normalise_intensity(
    hu: Tensor, lower_hu: float, upper_hu: float, mean: float, std: float
) -> Tensor:
    """Clip to [lower_hu, upper_hu], map to [0, 1], then (v - mean) / std; float32, a new tensor."""
    scale = 1.0 / ((upper_hu - lower_hu) * std)
    return (
        hu.to(torch.float32).clamp_(lower_hu, upper_hu).sub_(lower_hu).mul_(scale).sub_(mean / std)
    )


def _augment_intensity(image: Tensor, label: Tensor, draw: AugmentDraw, seed: int) -> Tensor:
    if draw.enhancement is not None:
        image = shift_enhancement(image, label, *draw.enhancement)
    if draw.slice_thickness is not None:
        image = thicken_slices(image, draw.slice_thickness)
    if draw.noise_sigma is not None:
        image = add_noise(image, draw.noise_sigma, seed)
    if draw.blur_sigma_voxels is not None:
        image = gaussian_blur(image, draw.blur_sigma_voxels)
    if draw.brightness is not None:
        image = scale_brightness(image, draw.brightness)
    if draw.contrast is not None:
        image = scale_contrast(image, draw.contrast)
    if draw.low_resolution is not None:
        image = lower_resolution(image, draw.low_resolution, in_plane_only=draw.in_plane_only)
    if draw.inverted_gamma is not None:
        image = change_gamma(image, draw.inverted_gamma, inverted=True)
    if draw.gamma is not None:
        image = change_gamma(image, draw.gamma)
    return image
