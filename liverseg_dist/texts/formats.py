"""Recognise scans in unsupported formats, so that a message can state how to convert them.

Formats are recognised by the file name, DICOM also by the first bytes.
"""

from collections.abc import Iterable
from pathlib import Path

from liverseg_dist.texts.names import clean_text, list_some

_ITK = 'e.g. with SimpleITK: sitk.WriteImage(sitk.ReadImage("IN"), "OUT.nii.gz")'
_DICOM = "e.g. with liverseg to-nifti IN_FOLDER --out OUT.nii.gz"
_NIBABEL = 'e.g. with nibabel: nibabel.save(nibabel.load("IN.hdr"), "OUT.nii.gz")'
UNSUPPORTED_FORMATS = {
    ".nrrd": ("NRRD", _ITK),
    ".nhdr": ("NRRD", _ITK),
    ".mha": ("MetaImage", _ITK),
    ".mhd": ("MetaImage", _ITK),
    ".dcm": ("DICOM", _DICOM),
    ".ima": ("DICOM", _DICOM),
    ".dicom": ("DICOM", _DICOM),
    ".hdr": ("Analyze or two-file NIfTI", _NIBABEL),
    ".img": ("Analyze or two-file NIfTI", _NIBABEL),
    ".hdr.gz": ("Analyze or two-file NIfTI", _NIBABEL),
    ".img.gz": ("Analyze or two-file NIfTI", _NIBABEL),
    ".mgz": ("FreeSurfer MGH", _NIBABEL.replace(".hdr", ".mgz")),
    ".mgh": ("FreeSurfer MGH", _NIBABEL.replace(".hdr", ".mgh")),
    ".gipl": ("GIPL", _ITK),
    ".tif": ("TIFF", _ITK),
    ".tiff": ("TIFF", _ITK),
    ".nii.bz2": ("bzip2", "with bunzip2"),
    ".nii.xz": ("xz", "with unxz"),
    ".nii.zst": ("zstd", "with unzstd"),
    ".zip": ("ZIP", "unpack it first"),
}
DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")
_DICOM_SIGNATURE = (128, b"DICM")
"""Offset in bytes, and the bytes there."""
_MAX_INSPECTED_FILES = 20
"""Files of a folder whose first bytes are read."""


def detect_unsupported_format(path: Path) -> tuple[str, str] | None:
    """Recognise a file or folder as a scan in an unsupported format.

    Returns:
        Name of the format and how to convert; None if it is not recognised.
    """
    name = path.name.lower()
    # The name first: it needs no access to the file.
    for suffix, known in UNSUPPORTED_FORMATS.items():
        if name.endswith(suffix):
            return known
    if path.is_dir():
        return ("DICOM folder", _DICOM) if _contains_dicom(path) else None
    return ("DICOM", _DICOM) if _is_dicom(path) else None


def explain_unsupported_format(path: Path) -> str | None:
    """Why a file is not read and what to do; None if its format is not recognised."""
    known = detect_unsupported_format(path)
    return None if known is None else f"{known[0]} is not read; convert it to .nii.gz, {known[1]}"


def describe_unread(paths: Iterable[Path]) -> list[str]:
    """Describe files and folders that are not read: a line for each format, with what to do."""
    groups: dict[tuple[str, str] | None, list[str]] = {}
    for path in sorted(paths):
        shown = clean_text(path.name) + ("/" if path.is_dir() else "")
        groups.setdefault(detect_unsupported_format(path), []).append(shown)
    lines = []
    for known, names in groups.items():
        if known is None:
            lines.append(f"not read, because they are not NIfTI: {list_some(names)}")
        else:
            lines.append(
                f"{known[0]} is not read: {list_some(names)}; convert to .nii.gz, {known[1]}"
            )
    return lines


def _contains_dicom(folder: Path) -> bool:
    try:
        # A few files are enough: a series may have thousands.
        inside = sorted(folder.iterdir())[:_MAX_INSPECTED_FILES]
    except OSError:
        return False
    return any(_is_dicom(path) for path in inside)


def _is_dicom(path: Path) -> bool:
    """Whether the suffix or the first bytes are DICOM's; files of a series often have no suffix."""
    if path.name.lower().endswith(DICOM_SUFFIXES):
        return True
    offset, signature = _DICOM_SIGNATURE
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(offset + len(signature))[offset:] == signature
    except OSError:
        return False
