"""Decoded cases that all processes of a node share: mapped files, one copy per node.

The files are in shared memory (/dev/shm) or in `data.cache_dir`, in a private folder (mode 0700).
Its name consists of the user and the store, so that ranks, and runs at the same time, use the same
folder without communication. `data.cache_gib` limits the folder; other cases are read from the
store. A file is created by a rename, so it is always complete. Each process holds a shared lock on
the folder; the last process removes it, and folders of killed processes are removed by the next
process that starts.
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
ShapePair = tuple[tuple[int, ...], tuple[int, ...]]
"""Shapes of image and label of a case."""


def default_cache_dir() -> Path:
    """Return shared memory if there is any, else the folder for temporary files."""
    # `_join_folder` creates a folder of mode 0700 in it and checks the owner.
    shm = Path("/dev/shm")  # nosec B108
    return shm if shm.is_dir() and os.access(shm, os.W_OK) else Path(tempfile.gettempdir())


class NodeCache:
    """Decoded image and label of the cases of one store. Safe for several threads and processes."""

    def __init__(self, parent: Path, store: str, fingerprint: bytes, limit_bytes: int) -> None:
        """Join the node's cache of one store.

        Args:
            parent: folder for caches.
            store: path or URL of the store.
            fingerprint: bytes that change when the store's cases change.
            limit_bytes: size limit of the cache.
        """
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._ready: dict[str, ReaderPair] = {}
        self._decoding: set[str] = set()
        self._refused = False
        prefix = f"liverseg-{os.getuid()}-"
        # Before the own folder is created, so that the memory of killed processes is free.
        _remove_abandoned(parent, prefix)
        # The fingerprint makes a converted store use another folder than its previous version.
        name = hashlib.sha256(store.encode() + b"\0" + fingerprint).hexdigest()[:20]
        self.folder = parent / (prefix + name)
        self._users: int | None = _join_folder(self.folder)

    def get_readers(self, case_id: str, image: BoxReader, label: BoxReader) -> ReaderPair | None:
        """Return readers of a cached case; None: read it from the store.

        A case that is not in the cache is decoded into it, if it fits. While one thread does so,
        the others read this case from the store, and other cases from the cache.
        """
        with self._lock:
            known = self._ready.get(case_id)
            is_decoded_here = case_id in self._decoding
            if known is not None or is_decoded_here or self._users is None:
                return known
            self._decoding.add(case_id)
        # Without the lock: decoding takes seconds, and other threads want cases that are ready.
        try:
            known = self._open_cached(case_id, (image.shape, label.shape)) or self._add_case(
                case_id, (image, label)
            )
        except FileNotFoundError:
            # The cache was closed meanwhile, and its folder removed: read from the store.
            if self._users is not None:
                raise
        finally:
            with self._lock:
                self._decoding.discard(case_id)
                if known is not None and self._users is not None:
                    self._ready[case_id] = known
        return known

    def _open_cached(self, case_id: str, shapes: ShapePair) -> ReaderPair | None:
        paths = self._cache_files(case_id)
        if not all(path.exists() for path in paths):
            return None
        image, label = (
            MemoryArray(np.memmap(path, dtype, mode="r", shape=shape))
            for path, (_, dtype), shape in zip(paths, _ARRAYS, shapes, strict=True)
        )
        return image, label

    def _add_case(self, case_id: str, source: ReaderPair) -> ReaderPair | None:
        """Decode a case into the folder, unless another process does so or the limit is reached."""
        if self._refused:
            return None
        finals, shapes = self._cache_files(case_id), (source[0].shape, source[1].shape)
        parts = [path.with_name(path.name + ".part") for path in finals]
        sizes = []
        for shape, (_, dtype) in zip(shapes, _ARRAYS, strict=True):
            sizes.append(int(np.prod(shape)) * dtype.itemsize)
        # Size check and reservation must be one step, or two processes could exceed the limit
        # together.
        with hold_lock(self.folder / _LEDGER):
            # Another process decodes this case now (None) or has decoded it.
            if any(path.exists() for path in (*parts, *finals)):
                return self._open_cached(case_id, shapes)
            used = self._read_used_bytes()
            if used + sum(sizes) > self._limit_bytes:
                self._refused = True
                return None
            # Before the files: a process that is killed in between makes the cache smaller, never
            # larger than its limit.
            self._write_used_bytes(used + sum(sizes))
            if not self._reserve_files(parts, sizes):
                self._write_used_bytes(used)
                return None
        try:
            for part, reader, (_, dtype) in zip(parts, source, _ARRAYS, strict=True):
                voxels = np.memmap(part, dtype, mode="r+", shape=reader.shape)
                reader.read_box((0,) * voxels.ndim, voxels)
            for part, final in zip(parts, finals, strict=True):
                os.replace(part, final)
        except BaseException:
            _remove_files(parts)
            with contextlib.suppress(OSError), hold_lock(self.folder / _LEDGER):
                self._write_used_bytes(self._read_used_bytes() - sum(sizes))
            raise
        return self._open_cached(case_id, shapes)

    def _read_used_bytes(self) -> int:
        """Return the size of all cases in the folder; the caller holds the ledger's lock.

        A sum over the files would take time for every case that is there already.
        """
        try:
            return int((self.folder / _LEDGER).read_bytes() or b"0")
        # A process was killed while it wrote the number.
        except ValueError:
            return sum(file.stat().st_size for file in self.folder.iterdir())

    def _write_used_bytes(self, used: int) -> None:
        # In place: other processes hold the lock on this very file.
        with open(self.folder / _LEDGER, "r+b") as file:
            file.write(b"%020d" % max(0, used))

    def _reserve_files(self, parts: list[Path], sizes: list[int]) -> bool:
        """Allocate the files: a write to a mapping on a full file system would kill the process."""
        try:
            for part, size in zip(parts, sizes, strict=True):
                descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                try:
                    os.posix_fallocate(descriptor, 0, size)
                finally:
                    os.close(descriptor)
        except OSError as error:
            _remove_files(parts)
            self._refused = True
            log.warning(
                "%s: no more cases are cached: %s; decrease data.cache_gib",
                self.folder,
                error.strerror,
            )
            return False
        return True

    def _cache_files(self, case_id: str) -> list[Path]:
        return [self.folder / f"{case_id}.{name}" for name, _ in _ARRAYS]

    def close(self) -> None:
        """Leave the cache; the last process removes it.

        Mapped arrays that are still referenced stay readable.
        """
        with self._lock:
            users, self._users = self._users, None
            self._ready.clear()
        if users is not None:
            _remove_if_last(self.folder, users)


def _join_folder(folder: Path) -> int:
    """Take a shared lock on the folder, which is created if it does not exist.

    Returns:
        The descriptor that holds the lock.

    Raises:
        PermissionError: the folder belongs to another user.
    """
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid() or folder.is_symlink():
            raise PermissionError(13, "the cache folder belongs to another user", str(folder))
        try:
            descriptor = os.open(folder / _USERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            # Another process removed the folder between the two lines.
            continue
        take_lock(descriptor, shared=True)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / _USERS)):
                return descriptor
        # The last user removed the folder while this process waited for the lock.
        os.close(descriptor)


def _remove_if_last(folder: Path, users: int) -> None:
    try:
        # Without locks it is unknown whether other processes use the folder.
        if take_lock(users, wait=False):
            shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(users)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            _remove_if_last(folder, os.open(folder / _USERS, os.O_RDWR | os.O_CLOEXEC))


def _remove_files(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
