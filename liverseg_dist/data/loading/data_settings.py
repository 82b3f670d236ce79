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
        }
    )
