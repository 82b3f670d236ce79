"""File locks between processes, on one machine or several.

The system releases a lock when the process that holds it ends, for any reason. Some file systems
have no locks (Lustre mounted without `-o flock`). The functions report this, and the caller decides
how to continue.
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
    """Open a lock file, created if missing. Returns its descriptor.

    It is opened for reading and writing: on NFS 4, an exclusive lock needs a writable descriptor.
    """
    # The umask decides whether the group can use the lock, too.
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def take_lock(descriptor: int, *, shared: bool = False, wait: bool = True) -> bool:
    """Take a lock.

    Args:
        descriptor: from `open_lock`.
        shared: several processes may hold the lock at the same time.
        wait: wait until the lock is free.

    Returns:
        False if the file system has no locks.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is False.
    """
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    if not wait:
        operation |= fcntl.LOCK_NB
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


@contextmanager
def hold_lock(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path` while the block runs. Yields the result of `take_lock`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = open_lock(path)
    try:
        yield take_lock(descriptor, shared=shared, wait=wait)
    finally:
        # This releases the lock.
        os.close(descriptor)
