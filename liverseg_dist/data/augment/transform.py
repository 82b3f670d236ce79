"""`Transform`: one kind of augmentation with its own settings, and what it works on.

A transform has two halves. `draw` decides on the host whether a sample is augmented and with which
parameters; it is a pure function of the sample's random stream, so the loader and the device
compute the same draw without communication. `apply` does the work on the device.

Used by `presets` (which lists the transforms) and `device_transform` (which applies them).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from liverseg_dist.data.augment.host_tables import NO_TABLES, DeviceTables, TableKey
from liverseg_dist.data.counter_random import CounterRandom
from liverseg_dist.volume import Index3

Range = tuple[float, float]

ANISOTROPY_THRESHOLD = 3
"""Patches with one edge this many times the first edge are rotated and scaled in plane only.

This is nnU-Net's dummy 2D augmentation.
"""


@dataclass(frozen=True)
class SampleContext:
    """What a draw may depend on besides the random stream."""

    patch_size: Index3
    """Size of the network's input (z, y, x) in voxels."""
    seed: int
    """Augmentation seed of the sample, 0 <= seed < 2**63."""
    channels: int = 1
    """Channels of the image."""
    tables: DeviceTables = NO_TABLES
    """Tables that were packed with the batch; for `apply` only."""

    @property
    def is_anisotropic(self) -> bool:
        """Whether the sample is augmented in plane only."""
        # The first axis is z: thick slices make a patch with few voxels along z.
        return max(self.patch_size) / self.patch_size[0] > ANISOTROPY_THRESHOLD


@dataclass
class Sample:
    """One sample on the device; transforms replace or change the tensors."""

    channels_DHW: list[torch.Tensor]
    """The channels of the image, each float32 and normalised."""
    label_DHW: torch.Tensor
    """uint8, one label for all channels."""
    air_values: list[float]
    """Normalised intensity of air in each channel: what lies outside of the scan."""
    present: list[bool]
    """Whether the sample has each channel. An absent one is set to 0 after all transforms."""


class Transform(ABC):
    """Settings of one kind of augmentation. Subclasses are frozen dataclasses.

    The settings' defaults switch the transform off. The parameters of a drawn transform have a type
    that the subclass chooses; None means that the transform was not drawn for this sample.
    """

    def draw(self, random: CounterRandom, context: SampleContext) -> Any | None:
        """Draw the parameters of a sample; None: the sample is not augmented.

        A transform whose probability is 0 should take no number from the stream, so that adding it
        to the list of transforms does not change the samples of existing presets.
        """
        # Most transforms override this method; those that draw late do not.
        return None

    def draw_late(self, random: CounterRandom, context: SampleContext, drawn: Any | None) -> Any:
        """Complete `drawn` with numbers taken after the `draw` of all other transforms.

        It exists because the position of a draw in the stream is part of a run's results: two
        transforms (`lesion_transforms`) have always drawn here.
        """
        return drawn

    def list_tables(
        self, parameters: Any, field_shape: Index3, context: SampleContext
    ) -> list[TableKey]:
        """Return the tables that `apply` takes from `context.tables`.

        Args:
            parameters: what `draw` has drawn.
            field_shape: size (z, y, x) of the sample before the spatial transform.
            context: patch size and seed of the sample.
        """
        return []

    @abstractmethod
    def apply(self, sample: Sample, parameters: Any, context: SampleContext) -> None:
        """Augment the sample with drawn parameters."""

    @abstractmethod
    def describe(self, parameters: Any) -> list[str]:
        """Return short texts about drawn parameters, for `liverseg preview`."""


def draw_value(random: CounterRandom, probability: float, bounds: Range) -> float | None:
    """Draw a uniform value with this probability, else None."""
    if probability <= 0 or not random.draw_bool(probability):
        return None
    return random.draw_uniform(*bounds)


def draw_balanced_value(random: CounterRandom, probability: float, bounds: Range) -> float | None:
    """Draw a factor with this probability, else None: half of the factors are below 1."""
    if probability <= 0 or not random.draw_bool(probability):
        return None
    low, high = bounds
    # A uniform draw from (0.7, 1.5) would exceed 1 in five of eight cases; balanced draws make an
    # image darker as often as brighter.
    if low < 1 and random.draw_bool(0.5):
        return random.draw_uniform(low, 1.0)
    return random.draw_uniform(max(low, 1.0), high)
