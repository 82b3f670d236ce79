"""Which DICOM scans a command is given: folders, ZIPs and lists of files become `DicomScan`s.

    a file list            one scan for each series among the files
    a ZIP                  one scan
    a folder of one study  one scan, wherever its files lie below the folder
    a folder of several    one scan for each subfolder or ZIP

The last two are distinguished by StudyInstanceUID of the first image in each subfolder. If a source has
several series, `dicom_stacks.choose_stack` decides when it is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from liverseg_dist.data.findings import ScanFileError
from liverseg_dist.data.io.dicom_files import (
    ZIP_SUFFIX,
    DicomFile,
    open_dicom_files,
    walk_files,
)
from liverseg_dist.data.io.dicom_headers import DicomDamaged, FileHeader, read_file_header
from liverseg_dist.data.io.dicom_names import make_pseudonym
from liverseg_dist.data.io.dicom_series import DicomScan
from liverseg_dist.optional_packages import require_dicom
from liverseg_dist.texts.names import clean_text, is_scan_name

Naming = Literal["pseudonym", "folder"]
MAX_INSPECTED_FILES = 50
"""Files of a folder whose first bytes are read to find a DICOM file."""


@dataclass(frozen=True)
class DicomOptions:
    """How DICOM inputs are read and named: the options `--series`, `--fill-gaps` and `--names`."""

    series: str = ""
    fill_gaps: bool = False
    names: Naming = "pseudonym"


def is_dicom_source(path: Path) -> bool:
    """Whether a path is read as DICOM: a ZIP, a DICOM file, or a folder that has DICOM files, here
    or in a subfolder, and no NIfTI file itself."""
    if path.is_dir():
        try:
            names = [entry.name for entry in path.iterdir()]
        except OSError:
            return False
        return not any(is_scan_name(name) for name in names) and has_dicom_files(path)
    return not is_scan_name(path.name) and path.is_file() and has_dicom_files(path)


def has_dicom_files(folder: Path) -> bool:
    """Whether a folder (or a single file) has a DICOM file or a ZIP, here or in a subfolder."""
    for number, path in enumerate(walk_files(folder, "DICOM"), start=1):
        if path.name.lower().endswith(ZIP_SUFFIX) or DicomFile(number, path).is_dicom:
            return True
        if number >= MAX_INSPECTED_FILES:
            return False
    return False


def find_dicom_scans(
    paths: Sequence[Path], options: DicomOptions | None = None
) -> list[tuple[Path, DicomScan]]:
    """The scans of DICOM inputs in their order, each with the input that it comes from.

    Args:
        paths: for which `is_dicom_source` is true.
        options: None for the defaults.

    Raises:
        UserError: the packages for DICOM are not installed.
        ScanFileError: a file of a list cannot be read.
    """
    require_dicom()
    options = options or DicomOptions()
    scans: list[tuple[Path, DicomScan]] = []
    by_series: dict[str, list[Path]] = {}
    for path in paths:
        if path.is_dir():
            for inside in _divide_folder(path):
                scans.append((path, name_scan((inside,), options)))
        elif path.name.lower().endswith(ZIP_SUFFIX):
            scans.append((path, name_scan((path,), options)))
        else:
            by_series.setdefault(_read_series_uid(path), []).append(path)
    for files in by_series.values():
        scans.append((files[0], name_scan(tuple(files), options)))
    places = {path: place for place, path in reversed(list(enumerate(paths)))}
    return sorted(scans, key=lambda scan: places[scan[0]])


def name_scan(paths: tuple[Path, ...], options: DicomOptions) -> DicomScan:
    """The scan of these paths with its pseudonym, or named after its folder if asked."""
    # Without a readable image the scan fails later, under a name that follows from its path.
    header = find_first_header(paths)
    if options.names == "folder":
        path = paths[0] if len(paths) == 1 else paths[0].parent
        name = clean_text(path.resolve().name.removesuffix(ZIP_SUFFIX))
    elif header is None:
        name = make_pseudonym("scan", str(paths[0].absolute()), options.series)
    else:
        name = make_pseudonym("scan", header.study_uid, header.series_uid, options.series)
    patient = ""
    if header is not None and header.patient_id:
        patient = make_pseudonym("patient", header.patient_id)
    return DicomScan(paths, name, options.series, options.fill_gaps, patient)


def find_first_header(paths: Sequence[Path]) -> FileHeader | None:
    """Header of the first CT or MR image of a source, or of the first readable file."""
    first: FileHeader | None = None
    try:
        with open_dicom_files(paths, "DICOM") as files:
            for file in files:
                if not file.is_dicom:
                    continue
                try:
                    header = read_file_header(file)
                except (DicomDamaged, OSError):
                    continue
                if header.is_image:
                    return header
                first = first or header
    except ScanFileError:
        return None
    return first


def _divide_folder(folder: Path) -> list[Path]:
    """The folder itself if it holds one study, else its subfolders and ZIPs with DICOM files."""
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return [folder]
    sources = []
    studies = set()
    for path in entries:
        if path.is_file() and not path.name.lower().endswith(ZIP_SUFFIX):
            # Images in the folder itself: subfolders belong to the same scan.
            if DicomFile(1, path).is_dicom:
                return [folder]
            continue
        header = find_first_header((path,))
        if header is not None:
            sources.append(path)
            studies.add(header.study_uid)
    return sources if len(studies) > 1 else [folder]


def _read_series_uid(path: Path) -> str:
    try:
        return read_file_header(DicomFile(1, path)).series_uid
    except (DicomDamaged, OSError) as error:
        raise ScanFileError("DICOM file", "dicom_damaged", str(error)) from None
