"""Lock files of a store.

Conversion is correct on a file system without locks too: each file appears by one rename, and two
writers of a case write the same bytes. The locks avoid that two processes do the same work.
"""

from pathlib import Path


class StoreLocks:
    """Paths of the lock files, all in one folder that is not part of the data."""

    def __init__(self, private_dir: Path) -> None:
        self.folder = private_dir / "locks"

    def case(self, case_id: str) -> Path:
        """Its holder may write the case."""
        return self.folder / "cases" / case_id

    @property
    def root(self) -> Path:
        """Its holder may write or remove the root, and the records that the root is made from."""
        return self.folder / "root"

    @property
    def opening(self) -> Path:
        """Held for a moment by each conversion that starts."""
        return self.folder / "opening"

    @property
    def sessions(self) -> Path:
        """Shared by all running conversions; exclusive for a change of the store's settings."""
        return self.folder / "sessions"
