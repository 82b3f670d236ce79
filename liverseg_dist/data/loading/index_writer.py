"""Writes and checks the loading index of a store (format: `loading_index`).

The conversion calls it before it writes the root; `liverseg index` adds an index to a store that
was converted earlier; `liverseg verify` compares an index with the arrays of the store.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import google_crc32c
import numpy as np

from liverseg_dist.data.loading.case_source import PatchStore
from liverseg_dist.data.loading.file_reads import ByteSource, LocalFiles
from liverseg_dist.data.loading.loading_index import (
    ABSENT_SHARD,
    FORMAT,
    MAGIC,
    RECORD_HEAD,
    TRAILER,
    LoadingIndex,
    ShardIndex,
    read_directory,
)
from liverseg_dist.data.loading.sampling import ForegroundIndex
from liverseg_dist.data.loading.shard_layout import parse_layout
from liverseg_dist.data.loading.shard_reader import ChunkError, ShardedArray, short_message
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.data.store.layout import CASES, CHECKSUM_FILE, DTYPES, INDEX_FILE
from liverseg_dist.errors import UserError
from liverseg_dist.files import atomic_write, file_sha256, write_text


class IndexableStore(PatchStore, Protocol):
    """The part of `CaseStore` that is used here."""

    @property
    def case_ids(self) -> Sequence[str]: ...


def write_index(
    store: IndexableStore,
    file: BinaryIO,
    on_case_done: Callable[[str], None] = lambda case_id: None,
) -> dict[str, str]:
    """Write the index of a store in a folder.

    Args:
        store: the store.
        file: receives the index.
        on_case_done: called with the id of each case.

    Returns:
        Why a labelled case is not in the index, by its id; the loader reads it from its own files.

    Raises:
        OSError: the index cannot be written.
    """
    left_out: dict[str, str] = {}
    files = LocalFiles(Path(store.path))
    try:
        _IndexFile(file).write_all(store, files, left_out, on_case_done)
    finally:
        files.close()
    return left_out


def add_index(store: CaseStore, on_case_done: Callable[[str], None]) -> dict[str, str]:
    """Add an index to a finished store, replacing an older one, and list its checksum.

    Args:
        store: the store, in a folder.
        on_case_done: called with the id of each case.

    Returns:
        As `write_index`.

    Raises:
        UserError: the store is not a folder, or does not record a hash of its content.
        OSError: the store cannot be written.
    """
    if "://" in store.path:
        raise UserError(f"{store.path}: run it where the store is a folder")
    if store.content_sha256 is None:
        raise UserError(
            f"{store.path}: does not record a hash of its content, so an index could not be bound "
            "to it; convert the data again"
        )
    path = Path(store.path) / INDEX_FILE
    # Of killed processes. A process that still writes fails at its rename, and can be repeated.
    for part in path.parent.glob(f".{INDEX_FILE}.*.tmp"):
        part.unlink(missing_ok=True)
    # Without its checksum while it changes: a process that is killed in between leaves a correct
    # store.
    _list_checksum(path.parent, None)
    with atomic_write(path) as file:
        left_out = write_index(store, file, on_case_done)
    _list_checksum(path.parent, file_sha256(path))
    return left_out


def _list_checksum(store: Path, sha256: str | None) -> None:
    """Replace the line of the index in the list of checksums; None: remove it."""
    path = store / CHECKSUM_FILE
    if not path.exists():
        # A copy may be without the list, which `verify` reports.
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.partition("  ")[2] != INDEX_FILE:
            lines.append(line)
    if sha256 is not None:
        lines.append(f"{sha256}  {INDEX_FILE}")
        # By file name, as the conversion writes them.
        lines.sort(key=lambda line: line.partition("  ")[2])
    write_text(path, "".join(f"{line}\n" for line in lines))


def has_complete_index(store: CaseStore) -> bool:
    """Whether a store in a folder has an undamaged index of its content with all labelled cases."""
    files = LocalFiles(Path(store.path))
    try:
        directory = read_directory(files)
        # Compared first: opening an index of other content writes a warning.
        if directory["content_sha256"] != store.content_sha256:
            return False
        index = LoadingIndex.open(files, store.content_sha256)
        if index is None:
            return False
        if set(index.case_ids) != set(_list_labelled(store)):
            return False
        for case_id in index.case_ids:
            index.read_record(case_id)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    finally:
        files.close()
    return True


def find_index_defects(store: CaseStore, case_ids: set[str]) -> Iterator[tuple[str, str]]:
    """Compare the index of a store in a folder with the store's arrays.

    Args:
        store: the store.
        case_ids: cases whose own files are undamaged; the others are not compared.

    Yields:
        Case (empty: the index as a whole) and description of each difference.
    """
    files = LocalFiles(Path(store.path))
    try:
        directory = read_directory(files)
        if directory["content_sha256"] != store.content_sha256:
            yield "", "belongs to another version of the store; run liverseg index"
            return
        index = LoadingIndex.open(files, store.content_sha256)
        if index is None:
            yield "", "is damaged; run liverseg index"
            return
        texts: dict[str, int] = {text: at for at, text in enumerate(directory["metadata"])}
        for case_id in sorted(case_ids & set(index.case_ids)):
            try:
                is_equal = index.read_record(case_id) == _encode_case(store, files, case_id, texts)
            except (OSError, ValueError, ChunkError):
                is_equal = False
            if not is_equal:
                yield case_id, "differs from the arrays of the case; run liverseg index"
        for case_id in sorted(set(index.case_ids) - set(store.case_ids)):
            yield case_id, "is in the index but not stored; run liverseg index"
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield "", f"is damaged ({short_message(error)[:80]}); run liverseg index"
    finally:
        files.close()


class _IndexFile:
    """The file while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._position = 0

    def write_all(
        self,
        store: IndexableStore,
        files: ByteSource,
        left_out: dict[str, str],
        on_case_done: Callable[[str], None],
    ) -> None:
        texts: dict[str, int] = {}
        records: dict[str, list[int]] = {}
        for case_id in _list_labelled(store):
            try:
                record = _encode_case(store, files, case_id, texts)
            # A damaged case is the business of `verify`; zarr raises many types of errors.
            except Exception as error:
                left_out[case_id] = " ".join(str(error).split())
                continue
            records[case_id] = [self._position, len(record) + 4]
            self._append(record + google_crc32c.value(record).to_bytes(4, "little"))
            on_case_done(case_id)
        directory = {
            "format": FORMAT,
            "content_sha256": store.content_sha256,
            "metadata": list(texts),
            "cases": records,
        }
        content = json.dumps(directory, separators=(",", ":")).encode()
        offset = self._position
        self._append(content)
        checksum = google_crc32c.value(content)
        self._append(TRAILER.pack(offset, len(content), checksum, MAGIC))

    def _append(self, content: bytes) -> None:
        self._file.write(content)
        self._position += len(content)


def _list_labelled(store: IndexableStore) -> list[str]:
    """The cases that training can use."""
    return [case_id for case_id in store.case_ids if store.meta(case_id).labelled]


def _encode_case(
    store: IndexableStore, files: ByteSource, case_id: str, texts: dict[str, int]
) -> bytes:
    """Return the record of a case; new metadata texts are added to `texts`."""
    may_be_empty = {"image": False, "label": not any(store.meta(case_id).class_voxels[1:])}
    numbers, counts, blocks = [], [], []
    for name, is_optional in may_be_empty.items():
        text, shard_index = _read_array_facts(files, case_id, name, is_optional)
        numbers.append(texts.setdefault(text, len(texts)))
        counts.append(ABSENT_SHARD if shard_index is None else len(shard_index))
        blocks.append(np.asarray(shard_index or [], "<u8").tobytes())
    foreground = ForegroundIndex(store.foreground(case_id))
    spans = foreground.list_spans()
    blocks.append(np.asarray(spans, "<i4").tobytes())
    blocks.append(foreground.voxels_zyx.astype("<i2").tobytes())
    head = RECORD_HEAD.pack(*numbers, *counts, len(spans), len(foreground.voxels_zyx))
    return head + b"".join(blocks)


def _read_array_facts(
    files: ByteSource, case_id: str, name: str, may_be_empty: bool
) -> tuple[str, ShardIndex | None]:
    """Return the metadata of an array as compact JSON, and the index of its only shard.

    Raises:
        ChunkError: the array cannot be read, or is not of the kind that can be indexed.
    """
    path = f"{CASES}/{case_id}/{name}"
    try:
        metadata = json.loads(files.read(f"{path}/zarr.json"))
    except (OSError, ValueError, RecursionError) as error:
        raise ChunkError(f"{path}: metadata cannot be read: {error}") from error
    layout = parse_layout(metadata)
    if layout is None or layout.dtype != DTYPES[name]:
        raise ChunkError(f"{path}: has codecs that cannot be indexed")
    # The store's writer makes one shard of each array; others stay outside of the index.
    if any(length > shard for length, shard in zip(layout.shape, layout.shard, strict=True)):
        raise ChunkError(f"{path}: has several shards")
    array = ShardedArray(files, path, layout, may_be_empty=may_be_empty)
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    return text, array.read_shard_index((0,) * len(layout.shape))
