"""Decoded cases shared by all processes of a node: mapped files, one copy per node however many ranks read them.

The files lie in memory (/dev/shm) unless `data.cache_dir` says otherwise, in a private folder (mode 0700) named after
the user and the store, so that ranks, and runs side by side, find each other without talking. `data.cache_gib` bounds
the folder; what does not fit is read from the store as before. A file appears by rename, whole or not at all. Each
process holds a shared lock on the folder; the last one to leave removes it, and what killed processes left behind is
removed by the next that starts.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np

from liverseg_dist.data.loading.array_reader import BoxReader, MemoryArray
from liverseg_dist.locks import hold_lock, take_lock

log = logging.getLogger(__name__)
_ARRAYS: tuple[tuple[str, np.dtype], ...] = (
    ("image", np.dtype(np.int16)),
    ("label", np.dtype(np.uint8)),
)
_USERS, _LEDGER = ".users", ".ledger"
ReaderPair = tuple[BoxReader, BoxReader]


def default_folder() -> Path:
    """Shared memory where there is any."""
    shm = Path("/dev/shm")  # in it a folder of mode 0700 that nobody else made (`_join`)  # nosec B108
    return shm if shm.is_dir() and os.access(shm, os.W_OK) else Path(tempfile.gettempdir())


class NodeCache:
    """Decoded image and label of the cases of one store. Safe to use from several threads and processes."""

    def __init__(self, parent: Path, store: str, fingerprint: bytes, limit_bytes: int) -> None:
        """`fingerprint`: bytes that change whenever the store's cases do."""
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._ready: dict[str, ReaderPair] = {}
        self._refused = False
        prefix = f"liverseg-{os.getuid()}-"
        _remove_abandoned(parent, prefix)
        name = hashlib.sha256(store.encode() + b"\0" + fingerprint).hexdigest()[:20]
        self.folder = parent / (prefix + name)
        self._users: int | None = _join(self.folder)

    def get(self, case_id: str, image: BoxReader, label: BoxReader) -> ReaderPair | None:
        """The cached readers of a case, decoding it first if nobody has and it fits; None: read it from the store."""
        with self._lock:
            known = self._ready.get(case_id)
            if known is None and self._users is not None:
                known = self._open(case_id, image.shape) or self._add(case_id, (image, label))
                if known is not None:
                    self._ready[case_id] = known
            return known

    def _open(self, case_id: str, shape: tuple[int, int, int]) -> ReaderPair | None:
        paths = self._paths(case_id)
        if not all(path.exists() for path in paths):
            return None
        image, label = (
            MemoryArray(np.memmap(path, dtype, mode="r", shape=shape))
            for path, (_, dtype) in zip(paths, _ARRAYS, strict=True)
        )
        return image, label

    def _add(self, case_id: str, source: ReaderPair) -> ReaderPair | None:
        """Decode a case into the folder, unless another process is at it or the limit is reached."""
        if self._refused:
            return None
        finals, shape = self._paths(case_id), source[0].shape
        parts = [path.with_name(path.name + ".part") for path in finals]
        sizes = [int(np.prod(shape)) * dtype.itemsize for _, dtype in _ARRAYS]
        with hold_lock(self.folder / _LEDGER):
            if any(path.exists() for path in (*parts, *finals)):
                return self._open(case_id, shape)
            used = sum(file.stat().st_size for file in self.folder.iterdir())
            if used + sum(sizes) > self._limit_bytes:
                self._refused = True
                return None
            if not self._reserve(parts, sizes):
                return None
        try:
            for part, reader, (_, dtype) in zip(parts, source, _ARRAYS, strict=True):
                voxels = np.memmap(part, dtype, mode="r+", shape=shape)
                reader.read_box((0, 0, 0), voxels)
            for part, final in zip(parts, finals, strict=True):
                os.replace(part, final)
        except BaseException:
            _remove(parts)
            raise
        return self._open(case_id, shape)

    def _reserve(self, parts: list[Path], sizes: list[int]) -> bool:
        """Allocate the files for good: writing to a mapping on a full file system would kill the process."""
        try:
            for part, size in zip(parts, sizes, strict=True):
                descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                try:
                    os.posix_fallocate(descriptor, 0, size)
                finally:
                    os.close(descriptor)
        except OSError as error:
            _remove(parts)
            self._refused = True
            log.warning(
                "%s: no more cases are cached: %s; lower data.cache_gib",
                self.folder,
                error.strerror,
            )
            return False
        return True

    def _paths(self, case_id: str) -> list[Path]:
        return [self.folder / f"{case_id}.{name}" for name, _ in _ARRAYS]

    def close(self) -> None:
        """Leave the cache; the last process out removes it. Mapped arrays that are still referenced stay readable."""
        with self._lock:
            users, self._users = self._users, None
            self._ready.clear()
        if users is not None:
            _remove_if_last(self.folder, users)


def _join(folder: Path) -> int:
    """A shared lock on the folder, which is made when missing; returns the descriptor that holds it."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid() or folder.is_symlink():
            raise PermissionError(13, "the cache folder belongs to somebody else", str(folder))
        try:
            descriptor = os.open(folder / _USERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # removed between the two lines
        take_lock(descriptor, shared=True)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / _USERS)):
                return descriptor
        os.close(descriptor)  # the last user removed the folder while we waited


def _remove_if_last(folder: Path, users: int) -> None:
    try:
        if take_lock(users, wait=False):  # else nobody can tell whether others use it
            shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(users)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            _remove_if_last(folder, os.open(folder / _USERS, os.O_RDWR | os.O_CLOEXEC))


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
