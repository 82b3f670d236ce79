"""Augmentation on the device: what a sample draws (`presets`), and how it is done (`transform`)."""

from liverseg_dist.data.augment.presets import (
    PRESETS,
    AugmentDraw,
    Preset,
    describe_augmentation,
    draw_augmentation,
    augmentation_preset,
)
from liverseg_dist.data.augment.device_transform import DeviceTransform, normalise_intensity

__all__ = [
    "PRESETS",
    "AugmentDraw",
    "DeviceTransform",
    "Preset",
    "describe_augmentation",
    "draw_augmentation",
    "normalise_intensity",
    "augmentation_preset",
]
