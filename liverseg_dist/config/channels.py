"""Settings of image channels: what a channel is called, what made it, how it is normalised."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from liverseg_dist.config.base import Section

Modality = Literal["CT", "MR", "other"]
IntensityKind = Literal["ct", "zscore", "percentiles", "range"]
ChannelName = Annotated[str, Field(min_length=1, max_length=100)]


class IntensityConfig(Section):
    """Mapping from stored voxel values to network input: clip to [lower_hu, upper_hu], scale to
    [0, 1], then (v - mean) / std. CT values are in HU, other values in stored units."""

    lower_hu: float
    upper_hu: float
    mean: float
    """Mean of the [0, 1] values over the foreground of the training cases."""
    std: float = Field(gt=0)
    """Standard deviation of the same values."""


class ChannelConfig(Section):
    """One channel of the images. The position in the list is the channel of the network."""

    name: ChannelName
    """Unique name; results and messages use it."""
    modality: Modality = "CT"
    """CT: Hounsfield units; MR and other: arbitrary units."""
    intensity: IntensityKind = "ct"
    """ct: clip and scale by the HU of the data set's foreground; zscore: mean and standard
    deviation of each scan within the body; percentiles: the 0.5 to 99.5 percentile range of each
    scan within the body; range: the fixed range of `lower` and `upper`."""
    lower: float | None = None
    """For intensity=range: the value that becomes 0."""
    upper: float | None = None
    """For intensity=range: the value that becomes 1."""

    @model_validator(mode="after")
    def _check_range(self) -> "ChannelConfig":
        has_range = self.lower is not None and self.upper is not None
        if self.intensity == "range" and not has_range:
            raise ValueError(f"channel {self.name}: intensity=range needs lower and upper")
        if self.lower is not None and self.upper is not None and self.lower >= self.upper:
            raise ValueError(f"channel {self.name}: lower {self.lower:g} is not below upper")
        if self.intensity == "ct" and self.modality != "CT":
            raise ValueError(
                f"channel {self.name}: intensity=ct reads Hounsfield units, but the modality is "
                f"{self.modality}; use intensity=zscore"
            )
        return self


CT_CHANNELS = (ChannelConfig(name="CT"),)
"""The channels of a CT data set."""


def check_channel_names(channels: Sequence[ChannelConfig]) -> None:
    """Raises `ValueError` for a name that is used twice, regardless of case."""
    names = [channel.name.casefold() for channel in channels]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two channels are called {name}")
