"""The files of a DICOM source: a folder with all its subfolders, a ZIP, single files, or a mix.

A ZIP is never unpacked to disk: its members are read into memory one at a time, and their names are
not used as paths. Sizes are limited before anything is read (`MAX_ZIP_BYTES`).

Messages name a file by its number only: folders and file names often contain the name of a patient.
"""

import io
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from liverseg_dist.data.findings import ScanFileError

MAX_FILES = 200_000
MAX_FOLDER_DEPTH = 12
MAX_ZIP_BYTES = 16 << 30
"""Uncompressed size of all members of a ZIP."""
MAX_MEMBER_BYTES = 4 << 30
MIN_ZIP_MEMBER_BYTES = 132
SIGNATURE_OFFSET, SIGNATURE = 128, b"DICM"
BARE_STARTS = (b"\x08\x00\x00\x00", b"\x08\x00\x05\x00", b"\x08\x00\x08\x00", b"\x02\x00\x00\x00")
"""First bytes of files without the 128-byte preamble (ACR-NEMA style, often from research tools)."""
ZIP_SUFFIX = ".zip"
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError)


@dataclass(frozen=True)
class DicomFile:
    """One file on disk, or one member of a ZIP.

    Attributes:
        number: from 1, in the order of the source; it identifies the file in messages.
        path: the file, or the ZIP that has the member.
        archive: the open ZIP, or None.
        member: name of the member.
    """

    number: int
    path: Path
    archive: zipfile.ZipFile | None = None
    member: str = ""

    @property
    def label(self) -> str:
        """Describes the file without its name."""
        return f"file {self.number}"

    def open(self) -> BinaryIO:
        """The content as a stream that can seek.

        Raises:
            OSError: the file cannot be read.
            ScanFileError: the member of a ZIP is damaged or encrypted.
        """
        if self.archive is None:
            return self.path.open("rb")
        try:
            return io.BytesIO(self.archive.read(self.member))
        except ZIP_ERRORS:
            reason = f"{self.label} of the ZIP is damaged or encrypted; pack it again"
            raise ScanFileError("ZIP", "dicom_zip", reason) from None

    def read_start(self) -> bytes:
        """The first bytes, which show whether it is DICOM; empty if they cannot be read."""
        wanted = SIGNATURE_OFFSET + len(SIGNATURE)
        try:
            if self.archive is None:
                with self.path.open("rb") as stream:
                    return stream.read(wanted)
            with self.archive.open(self.member) as member:
                return member.read(wanted)
        except (OSError, *ZIP_ERRORS):
            return b""

    @property
    def is_dicom(self) -> bool:
        """Whether the first bytes are those of a DICOM file."""
        start = self.read_start()
        return start[SIGNATURE_OFFSET:] == SIGNATURE or start.startswith(BARE_STARTS)


@contextmanager
def open_dicom_files(paths: Sequence[Path], name: str) -> Iterator[list[DicomFile]]:
    """The files of a source in a fixed order. ZIPs stay open within the block.

    Args:
        paths: folders, ZIPs and files.
        name: of the source, for messages.

    Raises:
        ScanFileError: a path does not exist, or a ZIP is damaged or too large.
    """
    with ExitStack() as stack:
        files: list[DicomFile] = []
        for path in paths:
            for found in walk_files(path, name):
                number = len(files) + 1
                if found.name.lower().endswith(ZIP_SUFFIX):
                    archive = stack.enter_context(_open_zip(found, name))
                    for member in _list_members(archive, name):
                        files.append(DicomFile(len(files) + 1, found, archive, member))
                else:
                    files.append(DicomFile(number, found))
                if len(files) > MAX_FILES:
                    reason = f"more than {MAX_FILES:,} files; name the folder of one scan"
                    raise ScanFileError(name, "dicom_too_many", reason)
        yield files


def walk_files(path: Path, name: str) -> Iterator[Path]:
    """The regular files of a folder and its subfolders, sorted; hidden ones are left out.

    Links are followed, each folder once.

    Raises:
        ScanFileError: the path cannot be read.
    """
    yield from _walk(path, name, 0, set())


def _walk(path: Path, name: str, depth: int, seen: set[tuple[int, int]]) -> Iterator[Path]:
    if depth > MAX_FOLDER_DEPTH:
        return
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            yield path
            return
        folder = (status.st_dev, status.st_ino)
        if not stat.S_ISDIR(status.st_mode) or folder in seen:
            return
        seen.add(folder)
        with os.scandir(path) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        # Below the top, one unreadable folder must not hide the rest.
        if depth:
            return
        raise ScanFileError(name, "unreadable", error.strerror or "not readable") from None
    for inside in names:
        yield from _walk(path / inside, name, depth + 1, seen)


def _open_zip(path: Path, name: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, ValueError, *ZIP_ERRORS):
        raise ScanFileError(name, "dicom_zip", "not a readable ZIP; pack it again") from None


def _list_members(archive: zipfile.ZipFile, name: str) -> list[str]:
    members = []
    total = 0
    for info in archive.infolist():
        if info.is_dir() or info.file_size < MIN_ZIP_MEMBER_BYTES:
            continue
        total += info.file_size
        if info.file_size > MAX_MEMBER_BYTES or total > MAX_ZIP_BYTES:
            reason = (
                f"the ZIP expands to more than {MAX_ZIP_BYTES >> 30} GiB, or one member to more "
                f"than {MAX_MEMBER_BYTES >> 30} GiB; unpack it and give the folder of one series"
            )
            raise ScanFileError(name, "dicom_zip_size", reason)
        members.append(info.filename)
    return sorted(members)
