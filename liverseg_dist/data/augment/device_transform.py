"""`DeviceTransform`: normalisation and augmentation of a batch on its device.

The result of a sample depends on its voxels and its seed alone: samples are processed one by one,
so neither the other samples of the batch nor the number of ranks can change a bit of it (on one
kind of device). A transform that is not drawn for a sample costs nothing.
"""

from typing import Protocol

import torch

from liverseg_dist.data.augment.host_tables import DeviceTables, TableKey
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
    def intensity_BC4(self) -> Tensor: ...
    @property
    def present_BC(self) -> Tensor: ...
    @property
    def augment_seed_B(self) -> Tensor: ...
    @property
    def tables(self) -> DeviceTables: ...


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
            batch: int16 images with all channels, uint8 labels.

        Returns:
            Image (B, C, D, H, W) float32, normalised, 0 in absent and dropped channels; and label
            (B, D, H, W) uint8.
        """
        image_BCDHW, label_BDHW = batch.image_BCDHW, batch.label_BDHW
        (count, channels), device = image_BCDHW.shape[:2], image_BCDHW.device
        if channels != self._preset.channels:
            raise ValueError(
                f"images of {channels} channels, augmentation for {self._preset.channels}; "
                "use build_preset with the store's channels"
            )
        # All samples are written into one pair of tensors, which saves a copy by `torch.stack`.
        shape = (count, channels, *self.patch_size)
        image_out = torch.empty(shape, dtype=torch.float32, device=device)
        label_out = torch.empty((count, *self.patch_size), dtype=torch.uint8, device=device)
        seeds, intensities = batch.augment_seed_B.tolist(), batch.intensity_BC4.tolist()
        present = batch.present_BC.tolist()
        for i in range(count):
            draw = draw_augmentation(self._preset, self.patch_size, seeds[i])
            sample = self._crop_and_normalise(
                image_BCDHW[i], label_BDHW[i], draw.field_shape, intensities[i], present[i]
            )
            self._augment(sample, draw, seeds[i], batch.tables)
            label_out[i] = sample.label_DHW
            for channel, image_DHW in enumerate(sample.channels_DHW):
                # Exactly 0 at the end, also where a transform has changed the zeros.
                image_out[i, channel] = image_DHW if sample.present[channel] else 0.0
        return image_out, label_out

    def _crop_and_normalise(
        self,
        image_CDHW: Tensor,
        label_DHW: Tensor,
        field_shape: Index3 | None,
        intensity_C4: list[list[float]],
        present: list[bool],
    ) -> Sample:
        """Return the field that the spatial transform samples."""
        shape = self.patch_size if field_shape is None else field_shape
        label = crop_centre(label_DHW, shape)
        images, air_values = [], []
        for image_DHW, (lower, upper, mean, std) in zip(image_CDHW, intensity_C4, strict=True):
            field = crop_centre(image_DHW, shape)
            images.append(normalise_intensity(field, lower, upper, mean, std))
            # Air is clipped to the lower bound, which is 0 before the standardisation.
            air_values.append(-mean / std)
        return Sample(images, label, air_values, list(present))

    def list_tables(self, seed: int, batch_shape: Index3) -> list[TableKey]:
        """Return the tables that the augmentation of a sample needs on the device.

        Args:
            seed: augmentation seed of the sample.
            batch_shape: size (z, y, x) of the images in the sample's batch.
        """
        draw = draw_augmentation(self._preset, self.patch_size, seed)
        wanted = self.patch_size if draw.field_shape is None else draw.field_shape
        # As `crop_centre` does: an axis that is shorter stays as it is.
        z, y, x = (min(size, length) for size, length in zip(wanted, batch_shape, strict=True))
        context = SampleContext(self.patch_size, seed, self._preset.channels)
        keys: list[TableKey] = []
        for name in APPLY_ORDER:
            if name in draw.parameters:
                keys += self._transforms[name].list_tables(
                    draw.parameters[name], (z, y, x), context
                )
        return keys

    def _augment(self, sample: Sample, draw: AugmentDraw, seed: int, tables: DeviceTables) -> None:
        context = SampleContext(self.patch_size, seed, len(sample.channels_DHW), tables)
        for name in APPLY_ORDER:
            if name in draw.parameters:
                self._transforms[name].apply(sample, draw.parameters[name], context)
