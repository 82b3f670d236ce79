"""`LoadingIndex`: what the loader must know of every case before it reads a voxel, in one file.

Without it, the first sample of a case opens eight small files (metadata of two arrays, two shard
indices, the foreground samples), and with 10,000 cases nearly every sample is the first of its
case. With it, a case is one read from a file that stays open.

The file is read by positioned reads and not mapped, for the reason in `file_reads`: a failed
page-in would kill the process. It works for fsspec URLs too. A store without the file, or with one
that is damaged or belongs to other content, is read as before: the samples are the same.

    records     one for each labelled case: shard indices, foreground spans and voxels, crc32c
    directory   JSON: format, hash of the content, metadata texts, position of each record
    trailer     offset, size and crc32c of the directory, magic number

Written by `index_writer`; `liverseg verify` compares it with the store.
"""

import json
import logging
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np

from liverseg_dist.data.loading.file_reads import ByteSource
from liverseg_dist.data.loading.sampling import ForegroundIndex
from liverseg_dist.data.loading.shard_layout import Layout, parse_layout, verify_checksum
from liverseg_dist.data.store.layout import INDEX_FILE

log = logging.getLogger(__name__)
FORMAT = 1
TRAILER = struct.Struct("<QQI4x8s")
"""Offset, size and crc32c of the directory, magic number."""
MAGIC = b"LSINDEX\1"
RECORD_HEAD = struct.Struct("<IIiiII")
"""Numbers of the metadata texts of image and label; chunks of image and label (-1: the shard does
not exist); foreground spans; foreground voxels."""
ABSENT_SHARD = -1
MAX_DIRECTORY_BYTES = 1 << 30
MAX_RECORD_BYTES = 1 << 28
ShardIndex = list[tuple[int, int]]
"""Offset and size of every chunk of a shard, in C order."""


@dataclass(frozen=True, eq=False)
class KnownArray:
    """An array with one shard: its metadata and the index of the shard (None: no shard)."""

    layout: Layout
    shard_index: ShardIndex | None


@dataclass(frozen=True, eq=False)
class IndexedCase:
    """What the index knows of a case."""

    image: KnownArray
    label: KnownArray
    foreground: ForegroundIndex


class LoadingIndex:
    """The index of a store. Safe to use from several threads."""

    def __init__(
        self, files: ByteSource, texts: Sequence[str], records: dict[str, tuple[int, int]]
    ) -> None:
        self._files = files
        self._texts = texts
        self._records = records
        self._layouts: dict[int, Layout] = {}
        self._lock = threading.Lock()
        self._has_warned = False

    @classmethod
    def open(cls, files: ByteSource, content_sha256: str | None) -> "LoadingIndex | None":
        """Open the index of a store.

        Args:
            files: the store's files.
            content_sha256: hash of the store's content; None: the store does not record it.

        Returns:
            The index; None if there is none, or none that belongs to this content.
        """
        if content_sha256 is None:
            return None
        try:
            directory = read_directory(files)
            texts = [str(text) for text in directory["metadata"]]
            records = {}
            for case_id, (offset, size) in directory["cases"].items():
                records[case_id] = (int(offset), int(size))
            bound_to = directory["content_sha256"]
        # The normal state of stores that were written before there was an index.
        except FileNotFoundError:
            return None
        # Remote file systems raise types of their own; a damaged file has many kinds of errors.
        except Exception as error:
            log.warning("%s is not used: %s", INDEX_FILE, " ".join(str(error).split())[:160])
            return None
        if bound_to != content_sha256:
            log.warning(
                "%s is not used: it belongs to another version of the store; "
                "`liverseg index STORE` writes it again",
                INDEX_FILE,
            )
            return None
        return cls(files, texts, records)

    @property
    def case_ids(self) -> list[str]:
        """The cases that the index has."""
        return list(self._records)

    def read_record(self, case_id: str) -> bytes:
        """Return the record of a case without its checksum.

        Raises:
            KeyError: the index does not have the case.
            ValueError: the record is damaged.
        """
        offset, size = self._records[case_id]
        if not 0 <= size <= MAX_RECORD_BYTES or offset < 0:
            raise ValueError(f"a record of {size:,} bytes")
        data = self._files.read_ranges(INDEX_FILE, [(offset, offset + size)])[0]
        if len(data) != size:
            raise ValueError("the file ends early")
        return bytes(verify_checksum(memoryview(data)))

    def find_case(self, case_id: str) -> IndexedCase | None:
        """Return what the index knows of a case; None: it must be read from the case's files."""
        if case_id not in self._records:
            return None
        try:
            return self._parse_record(self.read_record(case_id))
        # The case's own files are complete without the index: its damage must not stop a run.
        except Exception as error:
            with self._lock:
                is_first, self._has_warned = not self._has_warned, True
            if is_first:
                log.warning(
                    "%s is damaged (case %s: %s); the case is read without it; "
                    "`liverseg index STORE` writes it again",
                    INDEX_FILE,
                    case_id,
                    " ".join(str(error).split())[:160],
                )
            return None

    def _parse_record(self, record: bytes) -> IndexedCase:
        image_text, label_text, *counts, spans, voxels = RECORD_HEAD.unpack_from(record)
        position = RECORD_HEAD.size
        shard_indices = []
        for count in counts:
            index = None
            if count != ABSENT_SHARD:
                pairs = np.frombuffer(record, "<u8", 2 * count, position).reshape(-1, 2)
                index = [(offset, size) for offset, size in pairs.tolist()]
                position += 16 * count
            shard_indices.append(index)
        span_rows = np.frombuffer(record, "<i4", 4 * spans, position).reshape(-1, 4)
        position += 16 * spans
        voxels_zyx = np.frombuffer(record, "<i2", 3 * voxels, position).reshape(-1, 3)
        if position + 6 * voxels != len(record):
            raise ValueError("a record of another length than its numbers give")
        image, label = (
            self._known_array(text, index)
            for text, index in zip((image_text, label_text), shard_indices, strict=True)
        )
        return IndexedCase(image, label, ForegroundIndex.from_spans(voxels_zyx, span_rows.tolist()))

    def _known_array(self, text: int, index: ShardIndex | None) -> KnownArray:
        layout = self._layouts.get(text)
        # Two threads may parse a text twice; both get equal layouts.
        if layout is None:
            layout = parse_layout(json.loads(self._texts[text]))
            if layout is None:
                raise ValueError("metadata of an array that cannot be indexed")
            self._layouts[text] = layout
        if index is not None and len(index) * 16 + 4 * layout.index_checksummed != (
            layout.index_bytes
        ):
            raise ValueError("a shard index of another length than the array's")
        return KnownArray(layout, index)


def read_directory(files: ByteSource) -> dict[str, Any]:
    """Read the directory of an index.

    Raises:
        FileNotFoundError: the store has no index.
        ValueError: the index is damaged or of another format.
    """
    tail = files.read_tail(INDEX_FILE, TRAILER.size)
    if len(tail) != TRAILER.size:
        raise ValueError("the file is too short")
    offset, size, checksum, magic = TRAILER.unpack(tail)
    if magic != MAGIC or size > MAX_DIRECTORY_BYTES or offset > 1 << 62:
        raise ValueError("the trailer is damaged")
    text = files.read_ranges(INDEX_FILE, [(offset, offset + size)])[0]
    if len(text) != size or google_crc32c.value(text) != checksum:
        raise ValueError("the directory is damaged")
    directory = json.loads(text)
    if not isinstance(directory, dict) or directory.get("format") != FORMAT:
        raise ValueError("another format; install a newer liverseg_dist")
    return directory
