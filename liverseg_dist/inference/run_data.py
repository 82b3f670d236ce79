"""Whether a run is used on the labels and channels it was trained on.

Used by the commands that apply a run to a store.
"""

from collections.abc import Sequence

from liverseg_dist.config import ChannelConfig, DataConfig
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.errors import UserError
from liverseg_dist.inference.structure_values import describe_structures
from liverseg_dist.labels import LabelScheme

MAX_SHOWN = 24
"""Names in a message."""


def check_same_data(store: CaseStore, data: DataConfig) -> None:
    """Refuse a store whose labels or channels are not those of a run.

    Args:
        store: the store.
        data: settings of the run.

    Raises:
        UserError: names both sides.
    """
    labels = data.label_scheme
    if describe_structures(store.labels) != describe_structures(labels):
        raise UserError(
            f"{store.path}: has the labels {format_labels(store.labels)}; the run was trained on "
            f"{format_labels(labels)}; use a store with its labels"
        )
    if not have_same_channels(store.channels, data.image_channels):
        raise UserError(
            f"{store.path}: has the channels {format_channels(store.channels)}; the run was "
            f"trained on {format_channels(data.image_channels)}; use a store with its channels"
        )


def have_same_channels(channels: Sequence[ChannelConfig], others: Sequence[ChannelConfig]) -> bool:
    """Whether names (regardless of case) and modalities are equal, in the same order.

    A single channel may have another name: `CT` and `portal venous CT`.
    """
    # The modality decides about normalisation; a name may be written in many ways.
    if [one.modality for one in channels] != [one.modality for one in others]:
        return False
    names = [one.name.casefold() for one in channels]
    return len(channels) == 1 or names == [one.name.casefold() for one in others]


def format_labels(labels: LabelScheme) -> str:
    """The structures of a scheme for messages: `liver (1, 2), tumour (2)`."""
    parts = []
    for structure in labels.structures[:MAX_SHOWN]:
        parts.append(f"{structure.name} ({', '.join(map(str, structure.values))})")
    more = len(labels.structures) - len(parts)
    return ", ".join(parts) + (f" and {more} more" if more else "")


def format_channels(channels: Sequence[ChannelConfig]) -> str:
    """Channels for messages: `CT, T2 (MR)`."""
    parts = []
    for channel in channels:
        is_same = channel.name.casefold() == channel.modality.casefold()
        parts.append(channel.name if is_same else f"{channel.name} ({channel.modality})")
    return ", ".join(parts)
