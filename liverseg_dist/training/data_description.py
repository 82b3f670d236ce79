"""What the settings of a run record of its data: label scheme, channels, and the network's channels.

The store decides them when a run is started. A run is continued with the same ones only: the
outputs of its network stand for the structures of one scheme, its inputs for certain channels.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from liverseg_dist.config import ChannelConfig, Settings
from liverseg_dist.errors import UserError, printable
from liverseg_dist.labels import LabelScheme
from liverseg_dist.model.outputs import OutputChannels

MAX_NAMES = 24
"""Names that a message lists at most."""


def complete_settings(settings: Settings) -> Settings:
    """Fill in labels, channels, and the channels of the network.

    Runs of earlier versions record none of them: they have one CT channel and the labels of LiTS.
    """
    labels, channels = settings.data.label_scheme, settings.data.image_channels
    data = settings.data.model_copy(update={"labels": labels.to_json(), "channels": channels})
    outputs = OutputChannels(labels, settings.model.regions)
    model = settings.model.model_copy(
        update={"in_channels": len(channels), "out_channels": outputs.count}
    )
    return settings.model_copy(update={"data": data, "model": model})


def check_same_data(before: Settings, now: Settings, folder: Path) -> None:
    """Check that a run is continued with its own labels and channels.

    Raises:
        UserError: it is not; the message names both sides.
    """
    remedy = "continue it with a store like its own, or choose another run.dir to start a new run"
    if not _are_equal(before.data.label_scheme, now.data.label_scheme):
        raise UserError(
            f"{folder}: this run segments {describe_labels(before.data.label_scheme)}, the store "
            f"has {describe_labels(now.data.label_scheme)}; {remedy}"
        )
    if before.data.image_channels != now.data.image_channels:
        raise UserError(
            f"{folder}: this run reads {describe_channels(before.data.image_channels)}, the store "
            f"has {describe_channels(now.data.image_channels)}; {remedy}"
        )


def list_data_conflicts(
    settings: Settings, labels: LabelScheme, channels: Sequence[ChannelConfig]
) -> list[str]:
    """List the given settings that contradict a store's labels and channels, one line each."""
    found = []
    data, model = settings.data, settings.model
    if data.labels is not None and not _are_equal(data.label_scheme, labels):
        given = describe_labels(data.label_scheme)
        found.append(f"data.labels is {describe_labels(labels)}, not {given}")
    if data.channels is not None and data.channels != tuple(channels):
        given = describe_channels(data.channels)
        found.append(f"data.channels is {describe_channels(channels)}, not {given}")
    count = OutputChannels(labels, model.regions).count
    if model.in_channels not in (None, len(channels)):
        found.append(f"model.in_channels is {len(channels)}, not {model.in_channels}")
    if model.out_channels not in (None, count):
        found.append(f"model.out_channels is {count}, not {model.out_channels}")
    return found


def _are_equal(first: LabelScheme, second: LabelScheme) -> bool:
    """Whether two schemes have the same classes and structures, regardless of SNOMED codes."""
    plain = []
    for labels in (first, second):
        structures = [replace(structure, snomed=None) for structure in labels.structures]
        plain.append((labels.class_names, structures))
    return plain[0] == plain[1]


def describe_labels(labels: LabelScheme) -> str:
    """Describe a scheme on one line: its structures, with the container of those inside another."""
    shown = []
    for structure in labels.structures[:MAX_NAMES]:
        values = "+".join(map(str, structure.values))
        inside = "" if structure.inside is None else f" in {printable(structure.inside)}"
        shown.append(f"{printable(structure.name)} ({structure.kind} {values}{inside})")
    more = len(labels.structures) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def describe_channels(channels: Sequence[ChannelConfig]) -> str:
    """Describe channels on one line: name, modality, normalisation."""
    shown = []
    for channel in channels:
        fixed = ""
        if channel.intensity == "range":
            fixed = f" {channel.lower:g} to {channel.upper:g}"
        shown.append(f"{printable(channel.name)} ({channel.modality}, {channel.intensity}{fixed})")
    return f"{len(channels)} channel{'s' if len(channels) > 1 else ''}: {', '.join(shown)}"
