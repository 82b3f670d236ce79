"""Augmentation on the device: what a sample draws (`presets`), and how it is done (`transform`)."""

from liverseg_dist.data.augment.presets import (
    PRESETS,
    AugmentDraw,
    Preset,
    describe,
    draw_augmentation,
    preset_of,
)
from liverseg_dist.data.augment.device_transform import DeviceTransform, normalise

__all__ = [
    "PRESETS",
    "AugmentDraw",
    "DeviceTransform",
    "Preset",
    "describe",
    "draw_augmentation",
    "normalise",
    "preset_of",
]
