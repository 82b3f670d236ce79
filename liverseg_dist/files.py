"""Files that are there whole or not at all."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from liverseg_dist.errors import UserError


def check_working_directory() -> None:
    """Raises `UserError` where the working directory is gone: every relative path would be missing."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError(
            "the working directory no longer exists; cd to a folder that does"
        ) from None


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write to. It takes its name, synced to the disk, when the block ends well; else an earlier one stays.

    Raises an `OSError` that names `path`: of a full disk the system does not say whose file it was.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        if error.filename in (None, str(aside)):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    finally:
        aside.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: object) -> None:
    """NaN is refused (undefined is null)."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key of names in the order people expect: liver_2 before liver_10.

    The name itself comes last, so that `a1` and `a01` have one order as well.
    """
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts], name


def restrict_umask() -> None:
    """Remove write permission for other users from all files that this process creates.

    The group's permission stays as the user has set it, because groups share runs.
    """
    previous = os.umask(0o077)  # the umask can only be read by setting it
    os.umask(previous | 0o002)
