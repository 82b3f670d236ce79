"""The shard reader against zarr-python for every supported codec, and errors of damaged files."""

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import google_crc32c
import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

from liverseg_dist.data.loading.array_reader import (
    BoxReader,
    MemoryArray,
    SingleChannelImage,
    StoreReader,
    ZarrArray,
    read_padded,
)
from liverseg_dist.data.loading.file_reads import LocalFiles
from liverseg_dist.data.loading.shard_reader import ChunkError, ShardedArray

SHAPE = (20, 33, 47)
CODECS = {
    "blosc lz4": [BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=2)],
    "blosc lz4hc crc32c": [
        BloscCodec(cname="lz4hc", clevel=5, shuffle="shuffle", typesize=2),
        Crc32cCodec(),
    ],
    "blosc zstd": [BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle", typesize=2)],
    "zstd": [ZstdCodec(level=3)],
    "raw": [],
    "raw crc32c": [Crc32cCodec()],
}


def write(
    root: Path, codecs: list, name: str = "image", shards: tuple[int, int, int] = (16, 32, 32)
) -> np.ndarray:
    rng = np.random.default_rng(0)
    dtype = np.int16 if name == "image" else np.uint8
    voxels = rng.integers(0, 200, SHAPE).astype(dtype) - (100 if name == "image" else 0)
    voxels[:, :16, :16] = 0  # chunks of fill value, which zarr does not store
    group = zarr.open_group(str(root), mode="a")
    path = f"cases/a/{name}"
    array = group.create_array(
        path,
        shape=SHAPE,
        dtype=dtype,
        chunks=(8, 16, 16),
        shards=shards,
        compressors=codecs,
        fill_value=0,
    )
    array[:] = voxels
    return voxels.astype(dtype)


def boxes(count: int) -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    rng = np.random.default_rng(1)
    found = []
    for _ in range(count):
        ends = np.sort([[*rng.integers(0, n + 1, 2)] for n in SHAPE], axis=1)
        shape = np.maximum(1, ends[:, 1] - ends[:, 0])
        start = np.minimum(ends[:, 0], np.array(SHAPE) - shape)
        found.append((tuple(map(int, start)), tuple(map(int, shape))))
    return found


class Volume:
    """Reads boxes of the only channel of an image of schema 1, which is stored without an axis."""

    def __init__(self, image: BoxReader) -> None:
        assert isinstance(image, SingleChannelImage)
        assert image.shape[0] == 1
        self.image, self.reader = image, image._image

    def read_box(self, start: tuple[int, int, int], out: np.ndarray) -> None:
        self.image.read_box((0, *start), out[None])


def open_volume(reader: StoreReader, *, may_be_empty: bool = False) -> Volume:
    return Volume(reader.open_array("a", "image", may_be_empty=may_be_empty))


@pytest.mark.parametrize("codecs", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize(
    "shards", [(16, 32, 32), (24, 48, 48)], ids=["several shards", "one shard"]
)
def test_boxes_equal_zarr_python(
    tmp_path: Path, codecs: list, shards: tuple[int, int, int]
) -> None:
    write(tmp_path, codecs, shards=shards)
    truth = zarr.open_array(str(tmp_path), path="cases/a/image", mode="r")
    reader = StoreReader(tmp_path)
    array = open_volume(reader)
    assert isinstance(array.reader, ShardedArray)
    assert array.image.shape == (1, *SHAPE)
    for start, shape in boxes(12):
        out = np.full(shape, 77, np.int16)
        array.read_box(start, out)
        np.testing.assert_array_equal(
            out, truth[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
        )
    reader.close()


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_of_several_channels_equal_zarr_python(tmp_path: Path, channels: int) -> None:
    """As stored: a chunk has one channel, the shard has all."""
    shape = (channels, *SHAPE)
    voxels = np.random.default_rng(0).integers(-100, 200, shape).astype(np.int16)
    array = zarr.open_group(str(tmp_path), mode="w").create_array(
        "cases/a/image",
        shape=shape,
        dtype="int16",
        chunks=(1, 8, 16, 16),
        shards=(channels, 24, 48, 48),
        compressors=CODECS["blosc lz4hc crc32c"],
        fill_value=0,
    )
    array[:] = voxels
    reader = StoreReader(tmp_path)
    image = reader.open_array("a", "image")
    assert isinstance(image, ShardedArray)
    assert image.shape == shape
    for start, size in boxes(8):
        inside = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        for first in range(channels):
            out = np.full((channels - first, *size), 77, np.int16)
            image.read_box((first, *start), out)
            np.testing.assert_array_equal(out, voxels[first:][:, *inside])
    reader.close()


def test_index_at_the_start_of_the_shard(tmp_path: Path) -> None:
    codec = zarr.codecs.ShardingCodec(
        chunk_shape=(8, 16, 16),
        codecs=[zarr.codecs.BytesCodec(), CODECS["blosc lz4"][0]],
        index_location="start",
    )
    group = zarr.open_group(str(tmp_path), mode="w")
    array = group.create_array(
        "cases/a/image",
        shape=SHAPE,
        dtype="int16",
        chunks=(24, 48, 48),
        serializer=codec,
        compressors=[],
        filters=[],
    )
    voxels = np.arange(np.prod(SHAPE), dtype=np.int64).reshape(SHAPE).astype(np.int16)
    array[:] = voxels
    with_index_first = ShardedArray.open(LocalFiles(tmp_path), "cases/a/image")
    assert with_index_first is not None
    out = np.empty((5, 30, 20), np.int16)
    with_index_first.read_box((2, 1, 20), out)
    np.testing.assert_array_equal(out, voxels[2:7, 1:31, 20:40])


def test_labels_and_writing_into_a_part_of_an_array(tmp_path: Path) -> None:
    voxels = write(
        tmp_path, [BloscCodec(cname="lz4", clevel=5, shuffle="noshuffle", typesize=1)], "label"
    )
    out = np.full((10, 20, 20), 9, np.uint8)
    reader = StoreReader(tmp_path)
    reader.open_array("a", "label").read_box((3, 4, 5), out[2:8, 1:19, 3:17])
    np.testing.assert_array_equal(out[2:8, 1:19, 3:17], voxels[3:9, 4:22, 5:19])
    assert (out[:2] == 9).all()
    reader.close()


def test_any_other_codec_is_read_through_zarr_python(tmp_path: Path) -> None:
    voxels = write(tmp_path, [GzipCodec(level=1)])
    array = open_volume(StoreReader(tmp_path))
    assert isinstance(array.reader, ZarrArray)
    out = np.empty((5, 6, 7), np.int16)
    array.read_box((1, 2, 3), out)
    np.testing.assert_array_equal(out, voxels[1:6, 2:8, 3:10])


@pytest.mark.parametrize(
    "codecs", [CODECS["blosc lz4hc crc32c"], [GzipCodec()]], ids=["shard reader", "zarr-python"]
)
def test_store_behind_an_fsspec_url(tmp_path: Path, codecs: list) -> None:
    voxels = write(tmp_path, codecs)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/bucket/store.zarr", recursive=True)
    try:
        out = np.empty((9, 17, 30), np.int16)
        reader = StoreReader("memory://bucket/store.zarr")
        open_volume(reader).read_box((4, 9, 1), out)
        reader.close()
    finally:
        memory.rm("/bucket", recursive=True)
    np.testing.assert_array_equal(out, voxels[4:13, 9:26, 1:31])


class PlainServer(SimpleHTTPRequestHandler):
    """Python's own server: no range requests, always the complete file."""

    def log_message(self, format: str, *args: object) -> None:
        pass


class RangeServer(PlainServer):
    """As nginx and S3: status 206 and the requested bytes."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None or not path.is_file():
            return super().do_GET()
        content = path.read_bytes()
        first, last = asked.groups()
        part = (
            content[int(first) : int(last) + 1 if last else None]
            if first
            else content[-int(last) :]
        )
        self.send_response(206)
        start = int(first) if first else len(content) - len(part)
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)
        return None


@contextmanager
def served(folder: Path, handler: type[SimpleHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("handler", [PlainServer, RangeServer])
def test_store_behind_a_web_server(tmp_path: Path, handler: type[SimpleHTTPRequestHandler]) -> None:
    voxels = write(tmp_path, CODECS["blosc lz4hc crc32c"])
    out = np.empty((9, 17, 30), np.int16)
    with served(tmp_path, handler) as url:
        reader = StoreReader(url)
        array = open_volume(reader)
        array.read_box((4, 9, 1), out)
        reader.close()
    assert isinstance(array.reader, ShardedArray)
    np.testing.assert_array_equal(out, voxels[4:13, 9:26, 1:31])


def test_many_threads_and_few_descriptors(tmp_path: Path) -> None:
    voxels = write(tmp_path, CODECS["blosc lz4"])
    files = LocalFiles(tmp_path, max_open=1)
    array = ShardedArray.open(files, "cases/a/image")
    assert array is not None
    wrong: list[tuple] = []

    def read() -> None:
        for start, shape in boxes(30):
            out = np.empty(shape, np.int16)
            array.read_box(start, out)
            if not np.array_equal(
                out, voxels[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
            ):
                wrong.append((start, shape))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files.close()
    assert wrong == []


def shard_file(root: Path) -> Path:
    return root / "cases/a/image/c/0/0/0"


def read_all(root: Path) -> None:
    reader = StoreReader(root)
    try:
        open_volume(reader).read_box((0, 0, 0), np.empty(SHAPE, np.int16))
    finally:
        reader.close()


@pytest.mark.parametrize("codecs", [CODECS["blosc lz4"], CODECS["zstd"]], ids=["blosc", "zstd"])
def test_truncated_shard(tmp_path: Path, codecs: list) -> None:
    write(tmp_path, codecs)
    shutil.copy(shard_file(tmp_path), tmp_path / "whole")
    shard_file(tmp_path).write_bytes((tmp_path / "whole").read_bytes()[:-200])
    with pytest.raises(ChunkError, match=r"cases/a/image/c/0/0/0: the index cannot be read"):
        read_all(tmp_path)


def test_flipped_bytes_name_the_chunk(tmp_path: Path) -> None:
    write(tmp_path, CODECS["blosc lz4hc crc32c"], shards=(24, 48, 48))
    data = bytearray(shard_file(tmp_path).read_bytes())
    index = np.frombuffer(bytes(data[-(16 * 27 + 4) : -4]), "<u8").reshape(3, 3, 3, 2)
    offset, size = (int(v) for v in index[1, 2, 0])
    data[offset + size // 2] ^= 0x10
    shard_file(tmp_path).write_bytes(bytes(data))
    with pytest.raises(ChunkError, match=r"cases/a/image: chunk 1/2/0: wrong checksum"):
        read_all(tmp_path)


@pytest.mark.parametrize("place", [4, 12], ids=["decoded size", "encoded size"])
def test_wrong_blosc_header_is_an_error(tmp_path: Path, place: int) -> None:
    write(tmp_path, CODECS["blosc lz4"], shards=(24, 48, 48))
    data = bytearray(shard_file(tmp_path).read_bytes())
    index = np.frombuffer(bytes(data[-(16 * 27 + 4) : -4]), "<u8").reshape(3, 3, 3, 2)
    offset = int(index[2, 2, 2, 0])
    data[offset + place : offset + place + 4] = (10**6).to_bytes(4, "little")
    shard_file(tmp_path).write_bytes(bytes(data))
    with pytest.raises(ChunkError, match=r"chunk 2/2/2: .*blosc frame"):
        read_all(tmp_path)


def test_missing_shard_is_an_error_unless_the_array_may_be_empty(tmp_path: Path) -> None:
    write(tmp_path, CODECS["blosc lz4"], shards=(24, 48, 48))
    shard_file(tmp_path).unlink()
    with pytest.raises(ChunkError, match="the shard file is missing"):
        read_all(tmp_path)
    out = np.ones((2, 2, 2), np.int16)
    open_volume(StoreReader(tmp_path), may_be_empty=True).read_box((0, 0, 0), out)
    assert (out == 0).all()


def test_missing_metadata(tmp_path: Path) -> None:
    with pytest.raises(ChunkError, match="cases/gone/image: metadata"):
        StoreReader(tmp_path).open_array("gone", "image")


def test_box_outside_is_a_programming_error(tmp_path: Path) -> None:
    write(tmp_path, CODECS["blosc lz4"])
    array = open_volume(StoreReader(tmp_path))
    with pytest.raises(ValueError, match="is not inside the array"):
        array.read_box((0, 0, 40), np.empty((1, 1, 8), np.int16))


@pytest.mark.parametrize("start", [(0, 0, 0), (-3, -4, -5), (2, 3, 4), (-50, 0, 0), (3, 30, 2)])
def test_padding_equals_numpys(start: tuple[int, int, int]) -> None:
    voxels = np.random.default_rng(0).integers(0, 99, (6, 7, 8)).astype(np.int16)
    out = np.empty((5, 9, 7), np.int16)
    read_padded(MemoryArray(voxels), start, out, fill=-7)
    padded = np.pad(voxels, 60, constant_values=-7)
    np.testing.assert_array_equal(
        out, padded[tuple(slice(60 + a, 60 + a + n) for a, n in zip(start, out.shape, strict=True))]
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[8, 16, 16 * 10**9]),
        lambda m: m["codecs"][0]["configuration"].update(chunk_shape=[0, 16, 16]),
        lambda m: m["codecs"][0]["configuration"].update(chunk_shape=[8, 16, -16]),
        lambda m: m["codecs"][0]["configuration"].update(codecs=[]),
        lambda m: m["codecs"][0]["configuration"].update(index_codecs=[]),
        lambda m: m["codecs"][0].update(configuration=[]),
        lambda m: m.update(shape=[10**5] * 3),
        lambda m: m.update(shape=[float("inf"), 1, 1]),
        lambda m: m.update(fill_value=10**9),
        lambda m: m.update(fill_value=None),
        lambda m: m.update(chunk_key_encoding=5),
        lambda m: m.update(data_type="float32"),
        lambda m: m.update(data_type="uint8"),
    ],
)
def test_impossible_metadata_is_a_chunk_error(
    tmp_path: Path, change: Callable[[dict], object]
) -> None:
    write(tmp_path, CODECS["blosc lz4"])
    file = tmp_path / "cases/a/image/zarr.json"
    metadata = json.loads(file.read_text())
    change(metadata)
    file.write_text(json.dumps(metadata))
    out = np.empty((4, 4, 4), np.int16)
    with pytest.raises(ChunkError):
        open_volume(StoreReader(tmp_path)).read_box((0, 0, 0), out)


def test_index_with_a_huge_chunk_is_an_error(tmp_path: Path) -> None:
    """With a correct checksum, which random damage does not have."""
    write(tmp_path, CODECS["blosc lz4"], shards=(24, 48, 48))
    shard = tmp_path / "cases/a/image/c/0/0/0"
    raw = bytearray(shard.read_bytes())
    index = bytearray(raw[-(16 * 27 + 4) : -4])
    index[16 * 26 + 8 : 16 * 26 + 16] = (2**40).to_bytes(8, "little")
    raw[-(16 * 27 + 4) :] = bytes(index) + google_crc32c.value(bytes(index)).to_bytes(4, "little")
    shard.write_bytes(raw)
    out = np.empty((4, 1, 15), np.int16)
    with pytest.raises(ChunkError, match="the index is damaged"):
        open_volume(StoreReader(tmp_path)).read_box((16, 32, 32), out)
