"""Locks between processes, on one machine or several: they go with the processes that hold them, however they end.

Some file systems have none (Lustre mounted without `-o flock`). That is told, and what to do without is the caller's.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
LOCKS_REMEDY = (
    "mount it with file locks (Lustre: -o flock), or never run two sweeps in the same run.dir"
)
"""What to do where a file system has no locks; `liverseg doctor` and `launch doctor` print it."""


def open_lock(path: Path) -> int:
    """Descriptor of the lock file, made when missing. To read and write: NFS 4 shares a lock with readers alone."""
    return os.open(
        path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666
    )  # the umask decides whether a group shares it


def take_lock(descriptor: int, *, shared: bool = False, wait: bool = True) -> bool:
    """Take the lock; False: this file system has none. Raises `BlockingIOError` when it is taken and not `wait`."""
    try:
        fcntl.flock(
            descriptor,
            (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB),
        )
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


@contextmanager
def hold_lock(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold the lock `path` while the block runs; see `take_lock`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = open_lock(path)
    try:
        yield take_lock(descriptor, shared=shared, wait=wait)
    finally:
        os.close(descriptor)
