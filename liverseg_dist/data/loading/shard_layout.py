"""Metadata of a sharded Zarr v3 array and the decoders of its chunks.

Specification: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
Used by `shard_reader.ShardedArray`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numcodecs.blosc
import numcodecs.zstd
import numpy as np

from liverseg_dist.data.store.layout import IMAGE_DIMS, LABEL_DIMS, has_plausible_shape

_MALFORMED_ERRORS = (
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    ZeroDivisionError,
)
"""Raised by metadata with missing keys, wrong types or impossible numbers."""

Decoder = Callable[[memoryview, np.ndarray], Any]
"""Decodes the bytes of a chunk into an array."""


@dataclass(frozen=True)
class Layout:
    """The part of the array's zarr.json that is needed for reading."""

    shape: tuple[int, ...]
    dtype: np.dtype
    shard: tuple[int, ...]
    chunk: tuple[int, ...]
    fill_value: int
    decode: Decoder
    checksummed: bool
    index_at_end: bool
    index_checksummed: bool
    key_prefix: str
    key_separator: str

    @property
    def chunks_per_shard(self) -> tuple[int, ...]:
        return tuple(s // c for s, c in zip(self.shard, self.chunk, strict=True))

    @property
    def index_bytes(self) -> int:
        """Size of a shard's index: 16 bytes per chunk and perhaps a checksum."""
        return 16 * math.prod(self.chunks_per_shard) + (4 if self.index_checksummed else 0)

    @property
    def max_chunk_bytes(self) -> int:
        """Upper bound of an encoded chunk: no supported codec enlarges its voxels much."""
        return 2 * math.prod(self.chunk) * self.dtype.itemsize + 4096

    def shard_key(self, shard: tuple[int, ...]) -> str:
        """Return the path of a shard below the array's path."""
        return self.key_prefix + self.key_separator.join(map(str, shard))


def parse_layout(metadata: dict[str, Any]) -> Layout | None:
    """Parse the metadata of an array; None: it is not sharded or has other codecs."""
    try:
        (sharding,) = metadata["codecs"]
        if sharding["name"] != "sharding_indexed" or metadata["data_type"] not in (
            "int16",
            "uint8",
        ):
            return None
        configuration = sharding["configuration"]
        decode, checksummed = _parse_codecs(configuration["codecs"])
        index_names = [codec["name"] for codec in configuration["index_codecs"]]
        index_order = (
            configuration["index_codecs"][0].get("configuration", {}).get("endian", "little")
        )
        dtype, fill = np.dtype(metadata["data_type"]), metadata["fill_value"]
        keys = metadata["chunk_key_encoding"]
        separator = keys.get("configuration", {}).get("separator", "/")
        grid = metadata["chunk_grid"]["configuration"]
        shape, shard, chunk = map(
            _to_index, (metadata["shape"], grid["chunk_shape"], configuration["chunk_shape"])
        )
        # Zarr requires it, but a damaged file may violate it, and then chunk numbers would be
        # wrong.
        fits = all(s % c == 0 for s, c in zip(shard, chunk, strict=True))
        if decode is None or not fits or keys["name"] != "default":
            return None
        if index_names not in (["bytes"], ["bytes", "crc32c"]) or index_order != "little":
            return None
        if metadata["chunk_grid"]["name"] != "regular" or not has_plausible_shape(
            shape, shard, chunk
        ):
            return None
        # A fill value outside of the type would wrap around without an error.
        if not isinstance(fill, int) or not np.iinfo(dtype).min <= fill <= np.iinfo(dtype).max:
            return None
        # Storage transformers change file names in ways that this reader does not support.
        if not isinstance(separator, str) or metadata.get("storage_transformers"):
            return None
    except _MALFORMED_ERRORS:
        return None
    return Layout(
        shape,
        dtype,
        shard,
        chunk,
        fill,
        decode,
        checksummed,
        index_at_end=configuration.get("index_location", "end") == "end",
        index_checksummed="crc32c" in index_names,
        key_prefix=f"c{separator}",
        key_separator=separator,
    )


def _parse_codecs(codecs: list[dict[str, Any]]) -> tuple[Decoder | None, bool]:
    """Return the decoder of a chunk and whether a crc32c follows.

    The decoder is None for codecs that are not supported here.
    """
    names = [codec["name"] for codec in codecs]
    # crc32c can only be the last codec: it protects the encoded bytes.
    checksummed = names[-1] == "crc32c"
    if checksummed:
        names = names[:-1]
    little = codecs[0].get("configuration", {}).get("endian", "little") == "little"
    decoders: dict[tuple[str, ...], Decoder] = {
        ("bytes", "blosc"): _decode_blosc,
        ("bytes", "zstd"): numcodecs.zstd.decompress,
        ("bytes",): _copy_bytes,
    }
    return (decoders.get(tuple(names)) if little else None), checksummed


def _decode_blosc(data: memoryview, out: np.ndarray) -> None:
    """Decode a blosc frame after a check of its header, which C-Blosc itself does not check."""
    if len(data) < 16 or int.from_bytes(data[4:8], "little") != out.nbytes:
        raise ValueError("not a blosc frame of this chunk's size")
    if int.from_bytes(data[12:16], "little") != len(data):
        raise ValueError("the blosc frame has another length than in its header")
    numcodecs.blosc.decompress(data, out)


def _copy_bytes(data: memoryview, out: np.ndarray) -> None:
    out.reshape(-1)[:] = np.frombuffer(data, out.dtype)


def verify_checksum(data: memoryview) -> memoryview:
    """Return the data without the crc32c at its end.

    Raises:
        ValueError: the checksum does not match.
    """
    body = data[:-4]
    # An array, because google_crc32c does not accept a memoryview.
    if google_crc32c.value(np.frombuffer(body, np.uint8)) != int.from_bytes(data[-4:], "little"):
        raise ValueError("wrong checksum (crc32c)")
    return body


def _to_index(values: Sequence[int]) -> tuple[int, ...]:
    index = tuple(int(v) for v in values)
    if len(index) not in (LABEL_DIMS, IMAGE_DIMS):
        raise ValueError(f"{len(index)} dimensions")
    return index
