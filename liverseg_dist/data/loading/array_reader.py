"""Boxes of image and label voxels of a store's cases, from a folder or an fsspec URL.

Arrays with the store's own codecs are read by `shard_reader.ShardedArray`, any other Zarr array by
zarr-python. Voxels outside of an array are padding.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import fsspec
import numpy as np
import zarr

from liverseg_dist.data.loading.file_reads import ByteSource, LocalFiles, RemoteFiles
from liverseg_dist.data.loading.loading_index import KnownArray, LoadingIndex
from liverseg_dist.data.loading.shard_reader import ChunkError, Index, ShardedArray
from liverseg_dist.data.store.layout import DTYPES, IMAGE_DIMS, LABEL_DIMS
from liverseg_dist.data.store.metadata_checks import check_array


class BoxReader(Protocol):
    """Reads boxes of voxels of one array: images (c, z, y, x), labels (z, y, x)."""

    @property
    def shape(self) -> Index: ...

    def read_box(self, start: Index, out: np.ndarray) -> None:
        """Fill `out` with the voxels from `start`; the box must be inside the array."""


class ZarrArray:
    """Any Zarr array, read by zarr-python: all codecs, but slower by an order of magnitude."""

    def __init__(self, store: str, path: str) -> None:
        try:
            self._array = zarr.open_array(store, path=path, mode="r")
            check_array(self._array, path.rsplit("/", 1)[-1])
            if self._array.ndim not in (LABEL_DIMS, IMAGE_DIMS):
                raise ValueError(f"{self._array.ndim} dimensions")
        # zarr and its stores raise many types.
        except Exception as error:
            raise ChunkError(f"{path}: cannot be opened: {' '.join(str(error).split())}") from error
        self.path = path

    @property
    def shape(self) -> Index:
        return tuple(int(size) for size in self._array.shape)

    def read_box(self, start: Index, out: np.ndarray) -> None:
        try:
            out[...] = self._array[_box_at(start, out.shape)]
        except Exception as error:
            raise ChunkError(
                f"{self.path}: voxels from {start}: {' '.join(str(error).split())}"
            ) from error


class MemoryArray:
    """An array in memory (a mapped cache file, an array of a test)."""

    def __init__(self, voxels: np.ndarray) -> None:
        self._voxels = voxels

    @property
    def shape(self) -> Index:
        return self._voxels.shape

    def read_box(self, start: Index, out: np.ndarray) -> None:
        out[...] = self._voxels[_box_at(start, out.shape)]


class SingleChannelImage:
    """An image of schema 1, which has no axis of channels, as an image of one channel."""

    def __init__(self, image: BoxReader) -> None:
        self._image = image

    @property
    def shape(self) -> Index:
        return (1, *self._image.shape)

    def read_box(self, start: Index, out: np.ndarray) -> None:
        self._image.read_box(start[1:], out[0])


def _box_at(start: Index, shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + size) for begin, size in zip(start, shape, strict=True))


class StoreReader:
    """Readers of `cases/<id>/image` and `cases/<id>/label`. Safe to use from several threads."""

    def __init__(self, store: str | Path) -> None:
        self._store = str(store)
        self._files: ByteSource
        # fsspec URLs always contain a scheme; all other stores are local paths.
        if "://" in self._store:
            self._files = RemoteFiles(*fsspec.core.url_to_fs(self._store))
        else:
            self._files = LocalFiles(Path(self._store))

    def open_index(self, content_sha256: str | None) -> LoadingIndex | None:
        """Open the store's loading index; None: there is none of this content."""
        return LoadingIndex.open(self._files, content_sha256)

    def open_array(
        self,
        case_id: str,
        name: str,
        *,
        may_be_empty: bool = False,
        known: KnownArray | None = None,
    ) -> BoxReader:
        """Open an array of a case.

        Args:
            case_id: the case.
            name: image or label.
            may_be_empty: whether a missing shard is an array of fill values instead of an error.
            known: what the loading index knows of the array; then no file is opened here.

        Raises:
            ChunkError: the array cannot be opened.
        """
        path = f"cases/{case_id}/{name}"
        sharded: ShardedArray | None
        if known is not None:
            sharded = ShardedArray(
                self._files,
                path,
                known.layout,
                may_be_empty=may_be_empty,
                shard_indices={(0,) * len(known.layout.shape): known.shard_index},
            )
        else:
            # The fast reader first; it returns None for arrays that it does not support.
            sharded = ShardedArray.open(self._files, path, may_be_empty=may_be_empty)
        reader: BoxReader
        if sharded is not None and sharded.layout.dtype == DTYPES[name]:
            reader = sharded
        else:
            reader = ZarrArray(self._store, path)
        if name == "image" and len(reader.shape) == LABEL_DIMS:
            return SingleChannelImage(reader)
        expected = IMAGE_DIMS if name == "image" else LABEL_DIMS
        # Damaged metadata would otherwise end in an error without the array's name.
        if len(reader.shape) != expected:
            raise ChunkError(f"{path}: {len(reader.shape)} dimensions instead of {expected}")
        return reader

    def read_fingerprint(self) -> bytes:
        """Return the store's metadata, which changes with every conversion."""
        try:
            return self._files.read("zarr.json")
        except OSError as error:
            raise ChunkError(f"zarr.json: {error}") from error

    def close(self) -> None:
        """Close all files."""
        self._files.close()


def read_padded(array: BoxReader, start: Index, out: np.ndarray, fill: int) -> None:
    """Fill `out` with the voxels from `start`; voxels outside of the array are `fill`.

    Args:
        array: the array.
        start: first voxel, one number for each axis; may be negative.
        out: receives the voxels.
        fill: value outside of the array.
    """
    low = [max(0, begin) for begin in start]
    high = []
    for size, begin, length in zip(array.shape, start, out.shape, strict=True):
        high.append(min(size, begin + length))
    sizes = [stop - begin for begin, stop in zip(low, high, strict=True)]
    overlaps = min(sizes) > 0
    if not overlaps or sizes != list(out.shape):
        out[...] = fill
    if overlaps:
        window = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        array.read_box(tuple(low), out[window])
