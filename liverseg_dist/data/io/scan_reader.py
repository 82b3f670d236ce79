"""Read a scan from any source: a NIfTI file, or a DICOM folder, ZIP or list of files.

Commands hand over a `ScanSource`: a path, or a `DicomScan` where a series was selected or files were
listed. `read_scan` and `read_scan_volumes` return the same `ScanFile` for all.
"""

from pathlib import Path

from liverseg_dist.data.findings import ScanFileError
from liverseg_dist.data.io.dicom_files import walk_files
from liverseg_dist.data.io.dicom_series import DicomScan, hash_dicom_files, read_dicom_scan
from liverseg_dist.data.io.dicom_sources import DicomOptions, is_dicom_source, name_scan
from liverseg_dist.data.io.nifti import ScanFile, read_scan_channels, read_scan_file
from liverseg_dist.errors import UserError, printable
from liverseg_dist.files import file_sha256
from liverseg_dist.texts.names import clean_text
from liverseg_dist.volume import Volume

ScanSource = Path | DicomScan
"""What a scan is read from."""


def as_dicom(source: ScanSource) -> DicomScan | None:
    """The source as DICOM; None for NIfTI."""
    if isinstance(source, DicomScan):
        return source
    return name_scan((source,), DicomOptions()) if is_dicom_source(source) else None


def read_scan(source: ScanSource) -> ScanFile:
    """Read a scan with the findings about its headers.

    Raises:
        ScanFileError: the source is unreadable, damaged, or no volume.
    """
    dicom = as_dicom(source)
    if dicom is not None:
        return read_dicom_scan(dicom)
    assert isinstance(source, Path)
    return read_scan_file(source)


def read_scan_volume(source: ScanSource) -> Volume:
    """The volume of `read_scan` alone."""
    return read_scan(source).volume


def read_scan_volumes(source: ScanSource, count: int) -> list[ScanFile]:
    """Read a source of several channels: NIfTI in 4D. DICOM has one channel.

    Raises:
        ScanFileError: see `read_scan`; also where the source has another number of volumes.
    """
    if isinstance(source, Path) and not is_dicom_source(source):
        return read_scan_channels(source, count)
    if count > 1:
        reason = f"a DICOM series is one channel of {count}; name the series of each channel"
        raise ScanFileError(name_source(source), "channels", reason)
    return [read_scan(source)]


def hash_source(source: ScanSource) -> str:
    """SHA-256 of the file, or of all files of a DICOM source. Raises `OSError`, `UserError`."""
    if isinstance(source, DicomScan):
        return hash_dicom_files(source)
    if source.is_dir() or is_dicom_source(source):
        return hash_dicom_files(DicomScan((source,), "DICOM"))
    return file_sha256(source)


def list_source_files(source: ScanSource) -> list[Path]:
    """The files on disk that a source consists of."""
    if isinstance(source, Path) and not source.is_dir():
        return [source]
    paths = source.paths if isinstance(source, DicomScan) else (source,)
    files: list[Path] = []
    for path in paths:
        files += walk_files(path, name_source(source))
    return files


def size_of_source(source: ScanSource) -> int:
    """Bytes of the files that exist, as an estimate of the work."""
    try:
        return sum(file.stat().st_size for file in list_source_files(source))
    except (OSError, UserError):
        return 0


def name_source(source: ScanSource) -> str:
    """Name for messages and results: of a NIfTI file its name, of DICOM no part of its path."""
    return source.name if isinstance(source, DicomScan) else clean_text(source.name)


def locate_source(source: ScanSource) -> str:
    """For messages on the terminal: the path of a NIfTI file, the name of a DICOM scan."""
    return source.name if isinstance(source, DicomScan) else str(source)


def hide_paths(message: str, source: ScanSource) -> str:
    """The message with the source's name in place of its paths.

    Results are passed on to others, and folders can contain the name of a patient.
    """
    paths = source.paths if isinstance(source, DicomScan) else (source,)
    # Longest first: a folder is the beginning of its files.
    for path in sorted(paths, key=lambda path: -len(str(path))):
        for text in (str(path), printable(path)):
            message = message.replace(text, name_source(source))
    return message
