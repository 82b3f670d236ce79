"""Which augmentation a sample gets: named presets, and the draw of one sample's parameters.

`Preset` lists all transforms: a new one is a subclass of `Transform`, a field of `Preset` (at the
end: the order of the fields is the order of the draws) and a name in `APPLY_ORDER`.

A draw is a pure function of (preset, patch size, augmentation seed). The loader uses it to read as
large a field as a rotation needs, the device uses it to augment, and both get the same draw without
communication. Probabilities, ranges and the order of the transforms of `nnunet` are those of
nnU-Net v2's default trainer (https://github.com/MIC-DKFZ/nnUNet,
`nnUNetTrainer.get_training_transforms` and
`configure_rotation_dummyDA_mirroring_and_inital_patch_size`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

from liverseg_dist.config import DataConfig
from liverseg_dist.config.registry import find_registered
from liverseg_dist.config.train import AugmentationPreset
from liverseg_dist.data.augment.channel_transforms import ModalityDropoutTransform
from liverseg_dist.data.augment.intensity_transforms import (
    BlurTransform,
    BrightnessTransform,
    ContrastTransform,
    GammaTransform,
    LowResolutionTransform,
    NoiseTransform,
    ThickSlicesTransform,
)
from liverseg_dist.data.augment.lesion_transforms import (
    EnhancementTransform,
    LesionCopyTransform,
    copyable_values,
    enhancing_values,
)
from liverseg_dist.data.augment.spatial_transforms import (
    MirrorTransform,
    SpatialTransform,
    field_shape,
)
from liverseg_dist.data.augment.transform import SampleContext, Transform
from liverseg_dist.data.counter_random import CounterRandom
from liverseg_dist.volume import Index3

_DRAW_STREAM = 16
"""Purpose of the random stream of augmentation parameters."""
_ALL_AXES = MirrorTransform(axes=(0, 1, 2))
_INVERTED_GAMMA = GammaTransform(is_inverted=True)


@dataclass(frozen=True)
class Preset:
    """The settings of every transform; by default each transform is off.

    The fields are in the order in which parameters are drawn. Add new ones at the end, so that the
    samples of existing runs do not change.
    """

    spatial: SpatialTransform = field(default_factory=SpatialTransform)
    noise: NoiseTransform = field(default_factory=NoiseTransform)
    blur: BlurTransform = field(default_factory=BlurTransform)
    enhancement: EnhancementTransform = field(default_factory=EnhancementTransform)
    brightness: BrightnessTransform = field(default_factory=BrightnessTransform)
    contrast: ContrastTransform = field(default_factory=ContrastTransform)
    low_resolution: LowResolutionTransform = field(default_factory=LowResolutionTransform)
    thick_slices: ThickSlicesTransform = field(default_factory=ThickSlicesTransform)
    inverted_gamma: GammaTransform = _INVERTED_GAMMA
    gamma: GammaTransform = field(default_factory=GammaTransform)
    mirror: MirrorTransform = field(default_factory=MirrorTransform)
    lesion_copy: LesionCopyTransform = field(default_factory=LesionCopyTransform)
    modality_dropout: ModalityDropoutTransform = field(default_factory=ModalityDropoutTransform)
    channels: int = 1
    """Channels of the images."""

    def transforms(self) -> dict[str, Transform]:
        """Return the transforms by name, in the order of the draws."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Transform)}


APPLY_ORDER = (
    "spatial",
    "lesion_copy",
    "enhancement",
    "thick_slices",
    "noise",
    "blur",
    "brightness",
    "contrast",
    "low_resolution",
    "inverted_gamma",
    "gamma",
    "mirror",
    "modality_dropout",
)
"""Order in which a sample is augmented; transforms that nnU-Net has are in nnU-Net's order."""


PRESETS: dict[AugmentationPreset, Preset] = {
    "none": Preset(),
    "light": Preset(
        mirror=_ALL_AXES,
        noise=NoiseTransform(0.1),
        brightness=BrightnessTransform(0.15),
        contrast=ContrastTransform(0.15),
    ),
    "nnunet": Preset(
        spatial=SpatialTransform(p_rotation=0.2, p_scaling=0.2),
        mirror=_ALL_AXES,
        noise=NoiseTransform(0.1),
        # nnU-Net: 0.2 per image, then 0.5 per channel.
        blur=BlurTransform(0.1),
        brightness=BrightnessTransform(0.15),
        contrast=ContrastTransform(0.15),
        # nnU-Net: 0.25 per image, then 0.5 per channel.
        low_resolution=LowResolutionTransform(0.125),
        inverted_gamma=GammaTransform(0.1, is_inverted=True),
        gamma=GammaTransform(0.3),
    ),
    "strong": Preset(
        spatial=SpatialTransform(
            p_rotation=0.4, p_scaling=0.4, p_scaling_per_axis=0.5, p_elastic=0.2
        ),
        mirror=_ALL_AXES,
        noise=NoiseTransform(0.2),
        blur=BlurTransform(0.2),
        brightness=BrightnessTransform(0.3, (0.7, 1.3)),
        contrast=ContrastTransform(0.3, (0.65, 1.5)),
        low_resolution=LowResolutionTransform(0.2),
        thick_slices=ThickSlicesTransform(0.15),
        inverted_gamma=GammaTransform(0.1, is_inverted=True),
        gamma=GammaTransform(0.3),
        enhancement=EnhancementTransform(0.2),
        lesion_copy=LesionCopyTransform(0.2),
    ),
}


def build_preset(data: DataConfig, modality_dropout: float = 0.0) -> Preset:
    """Return the augmentation that the settings `data.augmentation` and `data.mirror_axes` name.

    Args:
        data: settings `data.*`, with the labels and channels of the store.
        modality_dropout: setting `train.modality_dropout`.

    Raises:
        UserError: no preset has this name.
    """
    preset = find_registered(PRESETS, data.augmentation, "data.augmentation")
    labels = data.label_scheme
    mirror = preset.mirror
    if data.mirror_axes is not None:
        axes = sorted("zyx".index(axis) for axis in set(data.mirror_axes))
        mirror = MirrorTransform(tuple(axes))
    return replace(
        preset,
        mirror=mirror,
        enhancement=replace(preset.enhancement, tissues=enhancing_values(labels)),
        lesion_copy=replace(preset.lesion_copy, pairs=copyable_values(labels)),
        modality_dropout=ModalityDropoutTransform(modality_dropout),
        channels=len(data.image_channels),
    )


@dataclass(frozen=True, eq=False)
class AugmentDraw:
    """The drawn parameters of one sample."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    """By the transform's name in `Preset`; a transform that was not drawn is absent."""
    field_shape: Index3 | None = None
    """Voxels (z, y, x), around the patch's centre, that the spatial transform samples; None: the
    patch itself."""


def describe_augmentation(preset: Preset, draw: AugmentDraw) -> list[str]:
    """Return short texts about the drawn transforms, in the order of their application."""
    transforms = preset.transforms()
    notes: list[str] = []
    for name in APPLY_ORDER:
        if name in draw.parameters:
            notes += transforms[name].describe(draw.parameters[name])
    return notes


def draw_augmentation(preset: Preset, patch_size: Index3, seed: int) -> AugmentDraw:
    """Draw the augmentation of the sample with this seed.

    Args:
        preset: settings of all transforms.
        patch_size: size (z, y, x) of the network's input in voxels.
        seed: augmentation seed of the sample, 0 <= seed < 2**63.
    """
    # Without augmentation no random stream is needed.
    if preset == PRESETS["none"]:
        return _NO_AUGMENTATION
    return _draw_cached(preset, patch_size, seed)


_NO_AUGMENTATION = AugmentDraw()


# Cached because the loader and the device both ask for the draw of each sample.
@lru_cache(maxsize=1024)
def _draw_cached(preset: Preset, patch_size: Index3, seed: int) -> AugmentDraw:
    context = SampleContext(patch_size, seed, preset.channels)
    random = CounterRandom(seed, 0, _DRAW_STREAM)
    transforms = preset.transforms()
    drawn: dict[str, Any] = {}
    for name, transform in transforms.items():
        drawn[name] = transform.draw(random, context)
    for name, transform in transforms.items():
        drawn[name] = transform.draw_late(random, context, drawn[name])
    parameters = {name: value for name, value in drawn.items() if value is not None}
    shape = None
    if "spatial" in parameters:
        shape = field_shape(parameters["spatial"], patch_size)
    return AugmentDraw(parameters, shape)
