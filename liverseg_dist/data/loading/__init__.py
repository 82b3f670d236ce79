"""From the store to batches: reading of arrays, order of samples, loader."""

from liverseg_dist.data.loading.case_source import Patch, PatchSource
from liverseg_dist.data.loading.device_batches import DeviceBatch, DevicePrefetcher
from liverseg_dist.data.loading.loader import Batch, PatchLoader

__all__ = ["Batch", "DeviceBatch", "DevicePrefetcher", "Patch", "PatchLoader", "PatchSource"]
