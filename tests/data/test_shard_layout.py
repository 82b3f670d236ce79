"""Metadata of arrays that Zarr itself writes, and metadata that the fast reader must leave to it."""

import copy
import json
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from liverseg_dist.data.loading.shard_layout import Layout, parse_layout, verify_checksum

SHAPE, SHARD, CHUNK = (1, 8, 8, 12), (1, 8, 8, 12), (1, 4, 4, 6)
INDEX_ENTRY_BYTES = 16


def write_array(folder: Path, compressors: Any, dtype: str = "int16") -> tuple[Path, np.ndarray]:
    """A sharded array that Zarr writes, and its values."""
    values = np.random.default_rng(1).integers(0, 200, SHAPE).astype(dtype)
    array = zarr.create_array(
        folder, shape=SHAPE, dtype=dtype, chunks=CHUNK, shards=SHARD, compressors=compressors
    )
    array[...] = values
    return folder, values


def read_metadata(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "zarr.json").read_text())
    return content


def read_chunk(folder: Path, layout: Layout, number: int) -> np.ndarray:
    """Decode one chunk of the only shard by the layout."""
    content = (folder / layout.shard_key((0, 0, 0, 0))).read_bytes()
    index = content[-layout.index_bytes :] if layout.index_at_end else content
    entries = np.frombuffer(index[: INDEX_ENTRY_BYTES * (number + 1)], "<u8").reshape(-1, 2)
    offset, size = (int(value) for value in entries[number])
    data = memoryview(content)[offset : offset + size]
    if layout.checksummed:
        data = verify_checksum(data)
    chunk = np.empty(layout.chunk, layout.dtype)
    layout.decode(data, chunk)
    return chunk


@pytest.mark.parametrize(
    ("compressors", "is_checksummed"),
    [
        pytest.param(ZstdCodec(level=3), False, id="zstd"),
        pytest.param(BloscCodec(cname="lz4hc", clevel=5), False, id="blosc"),
        pytest.param(None, False, id="uncompressed"),
        pytest.param([ZstdCodec(), Crc32cCodec()], True, id="zstd with a checksum"),
    ],
)
@pytest.mark.parametrize("dtype", ["int16", "uint8"])
def test_chunks_are_those_that_zarr_wrote(
    compressors: Any, is_checksummed: bool, dtype: str, tmp_path: Path
) -> None:
    folder, values = write_array(tmp_path / "a", compressors, dtype)
    layout = parse_layout(read_metadata(folder))
    assert layout is not None
    assert (layout.shape, layout.shard, layout.chunk) == (SHAPE, SHARD, CHUNK)
    assert layout.chunks_per_shard == (1, 2, 2, 2)
    assert layout.checksummed == is_checksummed
    assert np.array_equal(read_chunk(folder, layout, 0), values[:, :4, :4, :6])
    # The last chunk in C order is the last corner.
    assert np.array_equal(read_chunk(folder, layout, 7), values[:, 4:, 4:, 6:])


def test_an_encoded_chunk_stays_within_its_limit(tmp_path: Path) -> None:
    folder, _ = write_array(tmp_path / "a", ZstdCodec())
    layout = parse_layout(read_metadata(folder))
    assert layout is not None
    shard_bytes = (folder / layout.shard_key((0, 0, 0, 0))).stat().st_size
    assert shard_bytes - layout.index_bytes <= 8 * layout.max_chunk_bytes


def damage(path: str, value: Any) -> Any:
    """A change of the metadata: the entry at a path of keys, with dots between them."""

    def change(metadata: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        place: Any = metadata
        for key in parents:
            place = place[int(key) if key.isdigit() else key]
        place[int(last) if last.isdigit() else last] = value

    return change


CONFIGURATION = "codecs.0.configuration"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(damage("data_type", "float32"), id="another type"),
        pytest.param(damage("codecs.0.name", "zstd"), id="not sharded"),
        pytest.param(damage("codecs", []), id="no codecs"),
        pytest.param(damage(f"{CONFIGURATION}.codecs.1.name", "gzip"), id="another compressor"),
        pytest.param(damage(f"{CONFIGURATION}.chunk_shape", [1, 3, 4, 6]), id="chunks do not fit"),
        pytest.param(damage(f"{CONFIGURATION}.chunk_shape", [1, 0, 4, 6]), id="empty chunks"),
        pytest.param(damage(f"{CONFIGURATION}.chunk_shape", "all"), id="no chunk shape"),
        pytest.param(damage(f"{CONFIGURATION}.index_codecs", [{"name": "zstd"}]), id="index codec"),
        pytest.param(damage("chunk_grid.name", "rectilinear"), id="another grid"),
        pytest.param(damage("chunk_key_encoding.name", "v2"), id="other file names"),
        pytest.param(damage("fill_value", 70_000), id="fill value beyond the type"),
        pytest.param(damage("fill_value", None), id="no fill value"),
        pytest.param(damage("shape", [8, 8]), id="two dimensions"),
        pytest.param(damage("storage_transformers", [{"name": "x"}]), id="storage transformers"),
    ],
)
def test_other_metadata_is_left_to_zarr(change: Any, tmp_path: Path) -> None:
    folder, _ = write_array(tmp_path / "a", ZstdCodec())
    metadata = read_metadata(folder)
    assert parse_layout(metadata) is not None
    changed = copy.deepcopy(metadata)
    change(changed)
    assert parse_layout(changed) is None


@pytest.mark.parametrize("metadata", [{}, {"codecs": None}, {"codecs": [{}]}, {"codecs": 3}])
def test_damaged_metadata_is_left_to_zarr(metadata: dict[str, Any]) -> None:
    assert parse_layout(metadata) is None


def test_a_checksum_finds_every_flipped_byte() -> None:
    body = bytes(range(100))
    data = body + google_crc32c.value(body).to_bytes(4, "little")
    assert bytes(verify_checksum(memoryview(data))) == body
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 0x10
        with pytest.raises(ValueError, match="wrong checksum"):
            verify_checksum(memoryview(bytes(flipped)))


@pytest.mark.parametrize("place", [4, 12])
def test_a_damaged_blosc_header_is_no_crash(place: int, tmp_path: Path) -> None:
    """C-Blosc trusts the sizes in its header, so they are checked before it is called."""
    folder, _ = write_array(tmp_path / "a", BloscCodec(cname="lz4", clevel=5))
    layout = parse_layout(read_metadata(folder))
    assert layout is not None
    content = bytearray((folder / layout.shard_key((0, 0, 0, 0))).read_bytes())
    entries = np.frombuffer(bytes(content[-layout.index_bytes :])[:INDEX_ENTRY_BYTES], "<u8")
    offset, size = int(entries[0]), int(entries[1])
    content[offset + place : offset + place + 4] = (1 << 30).to_bytes(4, "little")
    chunk = np.empty(layout.chunk, layout.dtype)
    with pytest.raises(ValueError, match="blosc frame"):
        layout.decode(memoryview(bytes(content[offset : offset + size])), chunk)
