"""`DeviceTransform`: normalisation and augmentation of a batch on its device.

The result of a sample depends on its voxels and its seed alone: samples are processed one by one,
so neither the other samples of the batch nor the number of ranks can change a bit of it (on one
kind of device). A transform that is not drawn for a sample costs nothing.
"""

from typing import Protocol

import torch

from liverseg_dist.data.augment.presets import (
    APPLY_ORDER,
    AugmentDraw,
    Preset,
    draw_augmentation,
)
from liverseg_dist.data.augment.spatial_resampling import crop_centre
from liverseg_dist.data.augment.transform import Sample, SampleContext
from liverseg_dist.data.intensity import normalise_intensity
from liverseg_dist.volume import Index3

Tensor = torch.Tensor


class AugmentableBatch(Protocol):
    """What `DeviceTransform` reads of a batch (`data.loading.loader.Batch`)."""

    @property
    def image_BCDHW(self) -> Tensor: ...
    @property
    def label_BDHW(self) -> Tensor: ...
    @property
    def intensity_B4(self) -> Tensor: ...
    @property
    def augment_seed_B(self) -> Tensor: ...


class DeviceTransform:
    """Turn a raw batch into the network's input.

    Args:
        preset: settings of all transforms.
        patch_size: size (z, y, x) of the result in voxels. The batch's image may be larger, with
            the same centre.
    """

    def __init__(self, preset: Preset, patch_size: Index3) -> None:
        self._transforms = preset.transforms()
        self._preset = preset
        self.patch_size = patch_size

    @torch.no_grad()
    def __call__(self, batch: AugmentableBatch) -> tuple[Tensor, Tensor]:
        """Normalise and augment.

        Args:
            batch: int16 HU with one channel, uint8 labels.

        Returns:
            Image (B, 1, D, H, W) float32, normalised, and label (B, D, H, W) uint8.
        """
        hu_BCDHW, label_BDHW = batch.image_BCDHW, batch.label_BDHW
        count, device = hu_BCDHW.shape[0], hu_BCDHW.device
        # All samples are written into one pair of tensors, which saves a copy by `torch.stack`.
        image_out = torch.empty((count, 1, *self.patch_size), dtype=torch.float32, device=device)
        label_out = torch.empty((count, *self.patch_size), dtype=torch.uint8, device=device)
        seeds, intensities = batch.augment_seed_B.tolist(), batch.intensity_B4.tolist()
        for i in range(count):
            draw = draw_augmentation(self._preset, self.patch_size, seeds[i])
            sample = self._crop_and_normalise(
                hu_BCDHW[i, 0], label_BDHW[i], draw.field_shape, intensities[i]
            )
            self._augment(sample, draw, seeds[i])
            image_out[i, 0], label_out[i] = sample.image_DHW, sample.label_DHW
        return image_out, label_out

    def _crop_and_normalise(
        self, hu_DHW: Tensor, label_DHW: Tensor, field_shape: Index3 | None, intensity: list[float]
    ) -> Sample:
        """Return the field that the spatial transform samples."""
        lower_hu, upper_hu, mean, std = intensity
        shape = self.patch_size if field_shape is None else field_shape
        label = crop_centre(label_DHW, shape)
        image = normalise_intensity(crop_centre(hu_DHW, shape), lower_hu, upper_hu, mean, std)
        # Air is clipped to the lower bound, which is 0 before the standardisation.
        return Sample(image, label, air_value=-mean / std)

    def _augment(self, sample: Sample, draw: AugmentDraw, seed: int) -> None:
        context = SampleContext(self.patch_size, seed)
        for name in APPLY_ORDER:
            if name in draw.parameters:
                self._transforms[name].apply(sample, draw.parameters[name], context)
