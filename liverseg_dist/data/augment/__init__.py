"""Augmentation on the device.

`presets` draws the parameters of a sample, `device_transform` applies them. Each kind of
augmentation is one class with its own settings (`transform.Transform`); `presets.Preset` lists
all of them.
"""

from liverseg_dist.data.augment.device_transform import DeviceTransform
from liverseg_dist.data.augment.presets import (
    PRESETS,
    AugmentDraw,
    Preset,
    build_preset,
    describe_augmentation,
    draw_augmentation,
)
from liverseg_dist.data.intensity import normalise_intensity

__all__ = [
    "PRESETS",
    "AugmentDraw",
    "DeviceTransform",
    "Preset",
    "build_preset",
    "describe_augmentation",
    "draw_augmentation",
    "normalise_intensity",
]
