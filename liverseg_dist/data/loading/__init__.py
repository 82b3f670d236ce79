"""From the store to batches: reading of arrays, order of samples, loader."""

from liverseg_dist.data.loading.case_source import Patch, PatchSource, select_intensities
from liverseg_dist.data.loading.data_settings import fill_in_data_settings
from liverseg_dist.data.loading.device_batches import DeviceBatch, DevicePrefetcher
from liverseg_dist.data.loading.loader import Batch, PatchLoader

__all__ = [
    "Batch",
    "DeviceBatch",
    "DevicePrefetcher",
    "Patch",
    "PatchLoader",
    "PatchSource",
    "fill_in_data_settings",
    "select_intensities",
]
