"""Settings `data.*` that a store decides: voxel size, normalisation, channels and labels.

A training records them in the run's settings; previews and the Python interface use them too.
"""

from liverseg_dist.config import DataConfig
from liverseg_dist.data.store.case_store import CaseStore


def fill_in_data_settings(data: DataConfig, store: CaseStore) -> DataConfig:
    """Return the settings with what the store decides."""
    return data.model_copy(
        update={
            "spacing_mm": store.spacing_mm,
            "intensity": store.intensity,
            "labels": store.labels.to_json(),
            "channels": store.channels,
            "optional_channels": _list_optional_channels(data, store),
        }
    )


def _list_optional_channels(data: DataConfig, store: CaseStore) -> tuple[str, ...] | None:
    """Names of the channels that some training case lacks; None for a single channel."""
    if len(store.channels) == 1:
        return None
    lacking = set()
    for case_id in store.ids("train", data.fold):
        present = store.meta(case_id).present
        for channel, is_present in zip(store.channels, present, strict=True):
            if not is_present:
                lacking.add(channel.name)
    return tuple(channel.name for channel in store.channels if channel.name in lacking)
