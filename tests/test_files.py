"""`files.atomic_write` and what is built on it: whole or not at all, and an error that names the file."""

import errno
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from liverseg_dist.files import atomic_write, write_json, write_text


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """As on a full disk: no file may grow beyond this, and the system does not say which one wanted to."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_reported_with_the_file_and_the_earlier_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "before")
    with little_room(1000), pytest.raises(OSError) as caught:
        write_text(file, "x" * 5000)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(file))
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    def fails() -> None:
        with atomic_write(tmp_path / "a.bin") as out:
            out.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_another_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "a.bin"):
        (tmp_path / "other").read_bytes()
    assert caught.value.filename == str(tmp_path / "other")


def test_a_missing_folder_is_reported_with_the_requested_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_text(tmp_path / "no" / "a.txt", "")
    assert caught.value.filename == str(tmp_path / "no" / "a.txt")


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"dice": None})
    assert json.loads((tmp_path / "a.json").read_text()) == {"dice": None}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"dice": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"dice": None}
