"""Atomic writes, checksums and sort order of files: the one place for each, used by every package."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from liverseg_dist.errors import UserError


def check_working_directory() -> None:
    """Check that the working directory exists; otherwise every relative path would be missing.

    Raises:
        UserError: it has been removed.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError(
            "the working directory no longer exists; change to an existing folder"
        ) from None


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` when the block ends without an error.

    The content is on the disk before the file gets its name. After an error an earlier file is
    kept.

    Raises:
        OSError: the file cannot be written. It always names `path`; the system's own error for a
            full disk has no file name.
    """
    # With the process id, so that concurrent writers do not share a temporary file.
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with staging.open("wb") as file:
            yield file
            file.flush()
            # Otherwise a power failure could leave an empty file with the final name.
            os.fsync(file.fileno())
        os.replace(staging, path)
    except OSError as error:
        # The user needs the name of the target, not of the temporary file.
        if error.filename in (None, str(staging)):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    finally:
        staging.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_write(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically, as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically. NaN is an error: an undefined value is null."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content as 64 hexadecimal digits. Raises `OSError` where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return a sort key for names with numbers: liver_2 sorts before liver_10.

    The name itself is the last part of the key, so that the order of `a1` and `a01` is defined.
    """
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts], name


def restrict_umask() -> None:
    """Remove write permission for other users from all files that this process creates.

    The group's permission stays as the user has set it, because groups share runs.
    """
    previous = os.umask(0o077)  # the umask can only be read by setting it
    os.umask(previous | 0o002)
