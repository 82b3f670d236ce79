"""Settings of image channels: what a channel is called, what made it, how it is normalised."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

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
    """Default: ct for CT, range where `lower` and `upper` are given, else zscore. ct: clip and
    scale by the HU of the data set's foreground; zscore: mean and standard deviation of each scan
    within the body; percentiles: the 0.5 to 99.5 percentile range of each scan within the body;
    range: the fixed range of `lower` and `upper`."""
    lower: float | None = None
    """For intensity=range: the value that becomes 0."""
    upper: float | None = None
    """For intensity=range: the value that becomes 1."""

    @model_validator(mode="before")
    @classmethod
    def _choose_intensity(cls, data: Any) -> Any:
        """Fill in the intensity that fits the modality, so that naming the modality is enough."""
        if not isinstance(data, dict) or "intensity" in data:
            return data
        if data.get("lower") is not None and data.get("upper") is not None:
            return {**data, "intensity": "range"}
        is_ct = data.get("modality", "CT") == "CT"
        return data if is_ct else {**data, "intensity": "zscore"}

    @property
    def is_ct(self) -> bool:
        """Whether the voxels are Hounsfield units."""
        return self.modality == "CT"

    @property
    def has_own_intensity(self) -> bool:
        """Whether each scan has a normalisation of its own, not that of the data set."""
        return self.intensity != "ct"

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
CT_CHANNEL = CT_CHANNELS[0]


def check_channel_names(channels: Sequence[ChannelConfig]) -> None:
    """Raises `ValueError` for a name that is used twice, regardless of case."""
    names = [channel.name.casefold() for channel in channels]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two channels are called {name}")
