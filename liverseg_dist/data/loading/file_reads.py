"""Bytes of a store's files, from a folder or an fsspec file system.

Local files are read with `pread`, not mapped: on a parallel file system a failed page-in of a mapping kills the process
(SIGBUS), whereas a failed `pread` is an error that can name its case and chunk.
"""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class ByteSource(Protocol):
    """Where the store's files are: a folder, or an fsspec file system."""

    def read(self, key: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes [start, stop) of each range."""

    def read_tail(self, key: str, size: int) -> bytes: ...

    def close(self) -> None: ...


class LocalFiles:
    """Files below a local folder. Keeps at most `max_open` descriptors."""

    def __init__(self, root: Path, max_open: int = 128) -> None:
        self._root = root
        self._max_open = max_open
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._closed = False

    def read(self, key: str) -> bytes:
        return (self._root / key).read_bytes()

    def read_tail(self, key: str, size: int) -> bytes:
        with open(self._root / key, "rb") as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - size))
            return file.read(size)

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        descriptor = self._open(key)
        try:
            return [os.pread(descriptor, stop - start, start) for start, stop in ranges]
        finally:
            self._give_back(key, descriptor)

    def _open(self, key: str) -> int:
        with self._lock:
            descriptor = self._descriptors.pop(key, None)
        return (
            os.open(self._root / key, os.O_RDONLY | os.O_CLOEXEC)
            if descriptor is None
            else descriptor
        )

    def _give_back(self, key: str, descriptor: int) -> None:
        """A descriptor is owned by one thread while it reads, so that none is closed under a reader."""
        close = []
        with self._lock:
            if self._closed or key in self._descriptors:
                close.append(descriptor)
            else:
                self._descriptors[key] = descriptor
            if len(self._descriptors) > self._max_open:
                close.append(self._descriptors.pop(next(iter(self._descriptors))))
        for old in close:
            os.close(old)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            descriptors, self._descriptors = list(self._descriptors.values()), {}
        for descriptor in descriptors:
            os.close(descriptor)


class RemoteFiles:
    """Files below an fsspec URL (s3://, gs://, http://, memory:// ...).

    A web server that knows no range requests sends whole files: what was asked for is cut out of them, at the cost of
    transferring them.
    """

    def __init__(self, filesystem: Any, root: str) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")

    def read(self, key: str) -> bytes:
        return bytes(self._filesystem.cat_file(f"{self._root}/{key}"))

    def read_tail(self, key: str, size: int) -> bytes:
        return bytes(self._filesystem.cat_file(f"{self._root}/{key}", start=-size))[-size:]

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        path = f"{self._root}/{key}"
        starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
        parts = self._filesystem.cat_ranges([path] * len(ranges), starts, stops)
        return [
            bytes(part[start:stop] if len(part) > stop - start else part)
            for part, (start, stop) in zip(parts, ranges, strict=True)
        ]

    def close(self) -> None:
        pass
