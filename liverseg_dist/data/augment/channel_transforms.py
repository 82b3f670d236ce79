"""What concerns the channels of a sample: a draw for each channel, and channels that are dropped.

`ChannelTransform` is the base of transforms that change the intensities of one channel after the
other. `ModalityDropoutTransform` trains a network for scans that lack a channel.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from liverseg_dist.data.augment.host_tables import TableKey
from liverseg_dist.data.augment.transform import Sample, SampleContext, Transform
from liverseg_dist.data.counter_random import CounterRandom
from liverseg_dist.volume import Index3

_DROPOUT_STREAM = 18
"""Purpose of the random stream of dropped channels: no other draw depends on it."""
_CHANNEL_SEED_STEP = 0x1E3779B97F4A7C15
"""Odd, so that the seeds of a sample's channels differ."""


@dataclass(frozen=True)
class ChannelTransform(Transform):
    """An intensity transform with parameters for each channel.

    As in nnU-Net a sample is drawn first, then each of its channels. A sample of one channel takes
    one draw with the product of both probabilities. The drawn parameters are a tuple with one entry
    for each channel, None for a channel that does not change.
    """

    probability: float = 0.0
    """Probability for a channel."""

    @property
    def p_per_channel(self) -> float:
        """Probability for each channel of a drawn sample, where there are several channels."""
        return 1.0

    def draw(self, random: CounterRandom, context: SampleContext) -> tuple[Any, ...] | None:
        if context.channels == 1:
            value = self.draw_channel(random, self.probability)
            return None if value is None else (value,)
        p_sample = min(1.0, self.probability / self.p_per_channel)
        if p_sample <= 0 or not random.draw_bool(p_sample):
            return None
        values = []
        for _ in range(context.channels):
            values.append(self.draw_channel(random, self.p_per_channel))
        return None if all(value is None for value in values) else tuple(values)

    def apply(self, sample: Sample, parameters: tuple[Any, ...], context: SampleContext) -> None:
        for channel, value in enumerate(parameters):
            # An absent channel stays 0.
            if value is not None and sample.present[channel]:
                seed = channel_seed(context.seed, channel)
                sample.channels_DHW[channel] = self.apply_channel(
                    sample.channels_DHW[channel], value, context, seed
                )

    def list_tables(
        self, parameters: tuple[Any, ...], field_shape: Index3, context: SampleContext
    ) -> list[TableKey]:
        keys: list[TableKey] = []
        for value in parameters:
            if value is not None:
                keys += self.list_channel_tables(value, context)
        return keys

    def list_channel_tables(self, parameters: Any, context: SampleContext) -> list[TableKey]:
        """Return the tables that `apply_channel` takes from `context.tables`."""
        return []

    def describe(self, parameters: tuple[Any, ...]) -> list[str]:
        notes = []
        for channel, value in enumerate(parameters):
            if value is not None:
                which = f"channel {channel}: " if len(parameters) > 1 else ""
                notes.append(which + self.describe_channel(value))
        return notes

    @abstractmethod
    def draw_channel(self, random: CounterRandom, probability: float) -> Any | None:
        """Draw the parameters of one channel with this probability, else None."""

    @abstractmethod
    def apply_channel(
        self, image_DHW: torch.Tensor, parameters: Any, context: SampleContext, seed: int
    ) -> torch.Tensor:
        """Return the augmented channel; `image_DHW` may be changed.

        Args:
            image_DHW: float32, normalised.
            parameters: what `draw_channel` has drawn.
            context: patch size and seed of the sample.
            seed: seed of the channel, for random voxels.
        """

    @abstractmethod
    def describe_channel(self, parameters: Any) -> str:
        """Return a short text about the parameters of a channel."""


def channel_seed(seed: int, channel: int) -> int:
    """Return a seed for one channel of a sample; that of the first channel is the sample's."""
    return (seed + channel * _CHANNEL_SEED_STEP) % 2**63


@dataclass(frozen=True)
class ModalityDropoutTransform(Transform):
    """Sets present channels of a sample to 0, as if the scan lacked them, but never all.

    It depends on the sample's seed alone, so neither a restart nor the number of ranks changes it.
    """

    probability: float = 0.0
    """Probability for each present channel. Where all would be dropped, one of them is kept, each
    equally likely."""

    def draw_late(
        self, random: CounterRandom, context: SampleContext, drawn: None
    ) -> tuple[float, ...] | None:
        """Return a number in [0, 1) for each channel; None: no channel is dropped."""
        if self.probability <= 0 or context.channels == 1:
            return None
        own = CounterRandom(context.seed, 0, _DROPOUT_STREAM)
        chances = tuple(own.draw_uniform() for _ in range(context.channels))
        return chances if min(chances) < self.probability else None

    def apply(self, sample: Sample, parameters: tuple[float, ...], context: SampleContext) -> None:
        for channel in self.find_dropped(parameters, sample.present):
            sample.present[channel] = False

    def find_dropped(self, parameters: tuple[float, ...], present: list[bool]) -> list[int]:
        """Return the channels that a sample loses.

        Args:
            parameters: a number for each channel.
            present: whether the sample has each channel.
        """
        candidates = [channel for channel, is_present in enumerate(present) if is_present]
        dropped = [channel for channel in candidates if parameters[channel] < self.probability]
        if len(dropped) == len(candidates):
            # The numbers are independent and alike, so each channel is kept equally often.
            kept = max(dropped, key=lambda channel: parameters[channel])
            dropped.remove(kept)
        return dropped

    def describe(self, parameters: tuple[float, ...]) -> list[str]:
        # Which channels are dropped depends on those that the case has: see `find_dropped`.
        return ["modality dropout"]
