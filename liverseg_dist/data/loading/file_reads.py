"""Bytes of a store's files, from a folder or an fsspec file system.

Local files are read with `pread` and not mapped: on a parallel file system a failed page-in of a
mapping kills the process (SIGBUS), whereas a failed `pread` is an error whose message can contain
the case and the chunk.
"""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class ByteSource(Protocol):
    """Source of the store's files: a folder or an fsspec file system."""

    def read(self, key: str) -> bytes:
        """Return the complete file.

        Raises:
            FileNotFoundError: there is no such file.
        """

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes [start, stop) of each range."""

    def read_tail(self, key: str, size: int) -> bytes:
        """Return the last `size` bytes of a file."""

    def close(self) -> None:
        """Close all files."""


class LocalFiles:
    """Files below a local folder, with at most `max_open` open descriptors."""

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
        descriptor = self._take_descriptor(key)
        try:
            return [os.pread(descriptor, stop - start, start) for start, stop in ranges]
        finally:
            self._return_descriptor(key, descriptor)

    def _take_descriptor(self, key: str) -> int:
        # Taken out of the table while in use: a second thread opens the file again.
        with self._lock:
            descriptor = self._descriptors.pop(key, None)
        if descriptor is not None:
            return descriptor
        return os.open(self._root / key, os.O_RDONLY | os.O_CLOEXEC)

    def _return_descriptor(self, key: str, descriptor: int) -> None:
        """Make a descriptor available again.

        One thread owns a descriptor while it reads, so that no other thread closes it.
        """
        close = []
        with self._lock:
            # Another thread may have returned a descriptor of the same file in the meantime.
            if self._closed or key in self._descriptors:
                close.append(descriptor)
            else:
                self._descriptors[key] = descriptor
            if len(self._descriptors) > self._max_open:
                close.append(self._descriptors.pop(next(iter(self._descriptors))))
        # Outside of the lock, because close() may block on a network file system.
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

    A web server without range requests sends complete files, and the requested bytes are cut out of
    them: correct, but slow.
    """

    def __init__(self, filesystem: Any, root: str) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")

    def read(self, key: str) -> bytes:
        return bytes(self._filesystem.cat_file(f"{self._root}/{key}"))

    def read_tail(self, key: str, size: int) -> bytes:
        # The slice is for servers that ignore the range.
        return bytes(self._filesystem.cat_file(f"{self._root}/{key}", start=-size))[-size:]

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        path = f"{self._root}/{key}"
        # One call for all ranges, so that the file system can fetch them at the same time.
        starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
        parts = self._filesystem.cat_ranges([path] * len(ranges), starts, stops)
        result = []
        for part, (start, stop) in zip(parts, ranges, strict=True):
            is_complete_file = len(part) > stop - start
            result.append(bytes(part[start:stop] if is_complete_file else part))
        return result

    def close(self) -> None:
        pass
