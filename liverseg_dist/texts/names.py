"""Ids of scans: derived from file names, and found for the names in tables.

The id of a scan is its file name without folder, without `.nii` or `.nii.gz` (in upper or lower
case), and without nnU-Net's channel number `_0000`. It is one printable line in Unicode's NFC form:
bytes that are not UTF-8 and control characters are percent-escaped (`caf%E9`), other kinds of space
become a plain one. So an id can be printed and can name a file on any system. convert, predict,
score, evaluate and postprocess use the same ids.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

SUFFIXES = (".nii.gz", ".nii")
MAX_CHANNELS = 4
"""If more files differ only in a number, the numbers are case numbers (`case_0000` to `case_0130`).
"""
MAX_SHOWN = 10
_CHANNEL = re.compile(r"(?s)(.+)_0000")
_NUMBERED = re.compile(r"(?s)(.+)_(\d{4})")
_LITS = re.compile(r"(?:test-)?(?:volume|segmentation)-(\d+)")


def is_scan_name(name: str) -> bool:
    """Whether a file of this name is read as NIfTI. Hidden files are not."""
    # macOS adds a hidden file `._name` to each file on disks of other systems.
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def strip_suffix(name: str) -> str:
    """The file name without .nii or .nii.gz (in upper or lower case)."""
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def derive_scan_id(file_name: str, *, keep_channel: bool = False) -> str:
    """The id of the scan in a file.

    Args:
        file_name: Name without folders.
        keep_channel: A number `_0000` at the end is part of the id, not a channel.
    """
    stem = clean_text(strip_suffix(file_name))
    match = None if keep_channel else _CHANNEL.fullmatch(stem)
    return match[1] if match else stem


def clean_text(text: str) -> str:
    """Convert a text to one printable line: NFC, plain spaces, others percent-escaped."""
    return "".join(map(_clean_character, unicodedata.normalize("NFC", text))).strip()


def _clean_character(char: str) -> str:
    category = unicodedata.category(char)
    if category == "Zs":
        return " "
    # Zero-width marks, which spreadsheets and web pages leave in copied text.
    if category == "Cf":
        return ""
    # Python's representation of a byte that is not UTF-8 (surrogateescape).
    if 0xDC80 <= ord(char) <= 0xDCFF:
        return f"%{ord(char) - 0xDC00:02X}"
    if category == "Cs":
        return f"%u{ord(char):04X}"
    if not char.isprintable():
        return "".join(f"%{byte:02X}" for byte in char.encode())
    return char


def fold_id(name: str) -> str:
    """Key for comparisons that ignore case and Unicode's compatibility forms."""
    return unicodedata.normalize("NFKC", clean_text(name)).casefold()


def derive_pairing_key(case_id: str) -> str:
    """Key that is equal for an image and its label, or a mask and its ground truth.

    LiTS names them `volume-7` and `segmentation-7`.
    """
    folded = fold_id(case_id)
    match = _LITS.fullmatch(folded)
    return f"lits-{int(match[1])}" if match else folded


@dataclass(frozen=True)
class FolderScanIds:
    """Scan ids of the files of one folder."""

    ids: dict[str, str]
    """File name -> scan id."""
    channels: tuple[str, ...]
    """File names that are further channels of a scan."""


def assign_scan_ids(names: Iterable[str], labels: Collection[str] = ()) -> FolderScanIds:
    """Assign scan ids to the files of a folder.

    A number such as `_0000` may be a channel or part of the case name. It is a channel if a file
    with `_0000` exists, if at most `MAX_CHANNELS` files differ only in it, and if no label has it.

    Args:
        names: File names that `is_scan_name` accepts.
        labels: Ids of the label files, with numbers.
    """
    stems = {name: derive_scan_id(name, keep_channel=True) for name in names}
    # Labels have no channels, so a number in their names is part of the case name.
    numbered_cases = set()
    for label in labels:
        if match := _NUMBERED.fullmatch(label):
            numbered_cases.add(match[1])
    numbers: dict[str, set[str]] = {}
    for stem in stems.values():
        match = _NUMBERED.fullmatch(stem)
        if match and match[1] not in numbered_cases:
            numbers.setdefault(match[1], set()).add(match[2])
    ids: dict[str, str] = {}
    channels = []
    for name, stem in stems.items():
        match = _NUMBERED.fullmatch(stem)
        group = numbers.get(match[1], set()) if match else set()
        # Without `_0000` or with many numbers, the numbers are case numbers.
        if match is None or "0000" not in group or len(group) > MAX_CHANNELS:
            ids[name] = stem
        # nnU-Net counts channels from 0; a CT is the first one.
        elif match[2] == "0000":
            ids[name] = match[1]
        else:
            channels.append(name)
    return FolderScanIds(ids, tuple(channels))


class ScanIndex:
    """Finds the scan that a table or a split file names."""

    def __init__(self, scans: Iterable[str]) -> None:
        self._exact = set(scans)
        self._folded: dict[str, set[str]] = {}
        for scan in self._exact:
            for key in {fold_id(scan), derive_pairing_key(scan)}:
                self._folded.setdefault(key, set()).add(scan)

    def find_scan(self, text: str) -> str | None:
        """Find the id of a scan; None if no scan, or more than one, matches.

        The text may have a folder, a suffix, a channel number, or letters in another case. Exact
        matches come first, so that a scan whose name ends in `_0000` is found.
        """
        if text in self._exact:
            return text
        file_name = get_file_name(text)
        candidates = (derive_scan_id(file_name, keep_channel=True), derive_scan_id(file_name))
        for name in candidates:
            if name in self._exact:
                return name
        for name in candidates:
            for key in (fold_id(name), derive_pairing_key(name)):
                scans = self._folded.get(key, set())
                if len(scans) == 1:
                    return next(iter(scans))
        return None


def get_file_name(path: str) -> str:
    """The file name at the end of a path with `/` or `\\` separators."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def list_some(names: Sequence[str], max_shown: int = MAX_SHOWN) -> str:
    """The first names, and the number of further ones: `a, b and 3 more`."""
    rest = f" and {len(names) - max_shown} more" if len(names) > max_shown else ""
    return ", ".join(names[:max_shown]) + rest
