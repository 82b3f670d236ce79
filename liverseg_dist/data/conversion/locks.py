"""Locks between processes, on one machine or several: they go with the process that holds them, however it ends.

A file system that has no locks (Lustre mounted without `-o flock`) is no hindrance: every write is made whole by one
rename, and two writers of a case write the same bytes. Locks keep them from doing the work twice.
"""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold the lock `path`; False: locks do not work here. Raises `BlockingIOError` when it is taken and not `wait`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        works = True
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            works = False
        yield works


class Locks:
    """The locks of a store, all in one folder that is no part of the data."""

    def __init__(self, private: Path) -> None:
        self.folder = private / "locks"

    def case(self, case_id: str) -> Path:
        """Who holds it may write the case."""
        return self.folder / "cases" / case_id

    @property
    def root(self) -> Path:
        """Who holds it may write or withdraw the root, or a record that the root is made from."""
        return self.folder / "root"

    @property
    def opening(self) -> Path:
        """Held for a moment by each conversion that starts."""
        return self.folder / "opening"

    @property
    def sessions(self) -> Path:
        """Shared by all conversions that run; whoever changes the store's settings needs it alone."""
        return self.folder / "sessions"
