"""Augmentation on the device: what a sample draws (`presets`), and how it is done (`transform`)."""

from liverseg_dist.data.augment.device_transform import DeviceTransform, normalise_intensity
from liverseg_dist.data.augment.presets import (
    PRESETS,
    AugmentDraw,
    Preset,
    augmentation_preset,
    describe_augmentation,
    draw_augmentation,
)

__all__ = [
    "PRESETS",
    "AugmentDraw",
    "DeviceTransform",
    "Preset",
    "augmentation_preset",
    "describe_augmentation",
    "draw_augmentation",
    "normalise_intensity",
]
