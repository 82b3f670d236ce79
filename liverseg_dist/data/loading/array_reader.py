"""Image and label boxes of a store's cases, from a folder or an fsspec URL, by the fastest way that can read them.

Arrays in the store's own codecs go through `shards.ShardedArray`; any other Zarr array through zarr-python. What sticks
out of an array is padding.
"""

from pathlib import Path
from typing import Protocol

import fsspec
import numpy as np
import zarr

from liverseg_dist.data.loading.file_reads import ByteSource, LocalFiles, RemoteFiles
from liverseg_dist.data.loading.shard_reader import ChunkError, ShardedArray
from liverseg_dist.data.store.layout import DTYPES
from liverseg_dist.data.store.metadata_checks import check_array
from liverseg_dist.volume import Index3


class BoxReader(Protocol):
    @property
    def shape(self) -> Index3: ...

    def read_box(self, start: Index3, out: np.ndarray) -> None: ...


class ZarrArray:
    """Any Zarr array through zarr-python: slower by an order of magnitude, reads everything."""

    def __init__(self, store: str, path: str) -> None:
        try:
            self._array = zarr.open_array(store, path=path, mode="r")
            check_array(self._array, path.rsplit("/", 1)[-1])
            if self._array.ndim != 3:
                raise ValueError(f"{self._array.ndim} dimensions")
        except Exception as error:  # zarr and its stores raise many kinds
            raise ChunkError(f"{path}: cannot be opened: {' '.join(str(error).split())}") from error
        self.path = path

    @property
    def shape(self) -> Index3:
        z, y, x = self._array.shape
        return z, y, x

    def read_box(self, start: Index3, out: np.ndarray) -> None:
        box = tuple(
            slice(begin, begin + size) for begin, size in zip(start, out.shape, strict=True)
        )
        try:
            out[...] = self._array[box]
        except Exception as error:
            raise ChunkError(
                f"{self.path}: voxels from {start}: {' '.join(str(error).split())}"
            ) from error


class MemoryArray:
    """An array that is at hand (a mapped cache file, a test's array)."""

    def __init__(self, voxels: np.ndarray) -> None:
        self._voxels = voxels

    @property
    def shape(self) -> Index3:
        z, y, x = self._voxels.shape
        return z, y, x

    def read_box(self, start: Index3, out: np.ndarray) -> None:
        out[...] = self._voxels[
            tuple(slice(a, a + n) for a, n in zip(start, out.shape, strict=True))
        ]


class StoreReader:
    """Readers of `cases/<id>/image` and `cases/<id>/label`. Safe to use from several threads."""

    def __init__(self, store: str | Path) -> None:
        self._store = str(store)
        self._files: ByteSource
        if "://" in self._store:
            self._files = RemoteFiles(*fsspec.core.url_to_fs(self._store))
        else:
            self._files = LocalFiles(Path(self._store))

    def array(self, case_id: str, name: str, *, may_be_empty: bool = False) -> BoxReader:
        """`name`: image, label. Raises `ChunkError`."""
        path = f"cases/{case_id}/{name}"
        sharded = ShardedArray.open(self._files, path, may_be_empty=may_be_empty)
        known_type = sharded is not None and sharded.layout.dtype == DTYPES[name]
        return sharded if sharded is not None and known_type else ZarrArray(self._store, path)

    def fingerprint(self) -> bytes:
        """The store's own metadata, which changes with every conversion."""
        try:
            return self._files.read("zarr.json")
        except OSError as error:
            raise ChunkError(f"zarr.json: {error}") from error

    def close(self) -> None:
        self._files.close()


def read_padded(array: BoxReader, start: Index3, out: np.ndarray, fill: int) -> None:
    """Fill `out` with the voxels from `start`, which may be negative or reach beyond the array: `fill` there."""
    low = [max(0, begin) for begin in start]
    high = [
        min(size, begin + length)
        for size, begin, length in zip(array.shape, start, out.shape, strict=True)
    ]
    inside = all(b > a for a, b in zip(low, high, strict=True))
    if not inside or any(b - a < n for a, b, n in zip(low, high, out.shape, strict=True)):
        out[...] = fill
    if inside:
        window = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        z, y, x = low
        array.read_box((z, y, x), out[window])
