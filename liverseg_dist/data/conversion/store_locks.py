"""The locks of a store.

A file system without locks is no hindrance: every write is made whole by one rename, and two writers of a case write
the same bytes. StoreLocks keep them from doing the work twice.
"""

from pathlib import Path


class StoreLocks:
    """All in one folder that is no part of the data."""

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
