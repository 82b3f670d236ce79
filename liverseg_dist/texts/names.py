"""One rule for names: which scan a file belongs to, and which scan a table means.

The id of a scan is its file name without folder, without `.nii` or `.nii.gz` in any case, and
without nnU-Net's channel number `_0000`. It is a printable line in Unicode's NFC form: bytes that
are not UTF-8 and control characters are percent-escaped (`caf%E9`), other kinds of space become a
plain one. So it can be shown, and can name a file, anywhere. convert, predict, score, evaluate and
postprocess all use it.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

SUFFIXES = (".nii.gz", ".nii")
MAX_CHANNELS = 4
"""More files than this that differ only in a number are case numbers (`case_0000` to `case_0130`),
not channels.
"""
MAX_SHOWN = 10
_CHANNEL = re.compile(r"(?s)(.+)_0000")
_NUMBERED = re.compile(r"(?s)(.+)_(\d{4})")
_LITS = re.compile(r"(?:test-)?(?:volume|segmentation)-(\d+)")


def is_scan_name(name: str) -> bool:
    """Whether a file of this name is read as NIfTI. Hidden files (macOS adds `._name`) are not."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def strip_suffix(name: str) -> str:
    """File name without .nii or .nii.gz in any case."""
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def derive_scan_id(file_name: str, *, keep_channel: bool = False) -> str:
    """The id of the scan in a file of this name (no folders).

    `keep_channel`: a number `_0000` at the end is part of the id, because the label has it too.
    """
    stem = clean_text(strip_suffix(file_name))
    match = None if keep_channel else _CHANNEL.fullmatch(stem)
    return match[1] if match else stem


def clean_text(text: str) -> str:
    """One printable line: NFC, plain spaces, nothing invisible, the rest percent-escaped."""
    parts = []
    for char in unicodedata.normalize("NFC", text):
        kind = unicodedata.category(char)
        if kind == "Zs":
            parts.append(" ")
        elif kind == "Cf":  # zero-width marks, as spreadsheets and web pages leave behind
            continue
        elif 0xDC80 <= ord(char) <= 0xDCFF:  # how Python holds a byte that is not UTF-8
            parts.append(f"%{ord(char) - 0xDC00:02X}")
        elif kind == "Cs":
            parts.append(f"%u{ord(char):04X}")
        elif not char.isprintable():
            parts.append("".join(f"%{byte:02X}" for byte in char.encode()))
        else:
            parts.append(char)
    return "".join(parts).strip()


def fold_id(name: str) -> str:
    """Ids that are equal by this differ at most in case or in Unicode's compatibility forms."""
    return unicodedata.normalize("NFKC", clean_text(name)).casefold()


def derive_pairing_key(case_id: str) -> str:
    """Equal for an image and its label, or a mask and its truth: LiTS calls them `volume-7` and
    `segmentation-7`.
    """
    folded = fold_id(case_id)
    match = _LITS.fullmatch(folded)
    return f"lits-{int(match[1])}" if match else folded


@dataclass(frozen=True)
class FolderScanIds:
    """File names of one folder: the ids of those that are scans, and those that are further
    channels of one.
    """

    ids: dict[str, str]
    channels: tuple[str, ...]


def assign_scan_ids(names: Iterable[str], labels: Collection[str] = ()) -> FolderScanIds:
    """Ids of the files of a folder, where the neighbours tell whether `_0000` is a channel or a
    case number.

    Args:
        names: File names that `is_scan_name` accepts.
        labels: Ids, with channel, of the label files beside them: a number that the label has is
            the case's.
    """
    names = list(names)
    stems = {name: derive_scan_id(name, keep_channel=True) for name in names}
    label_matches = (_NUMBERED.fullmatch(label) for label in labels)
    case_numbers = {match[1] for match in label_matches if match}
    numbers: dict[str, set[str]] = {}
    for stem in stems.values():
        match = _NUMBERED.fullmatch(stem)
        if match and match[1] not in case_numbers:
            numbers.setdefault(match[1], set()).add(match[2])
    ids: dict[str, str] = {}
    channels = []
    for name, stem in stems.items():
        match = _NUMBERED.fullmatch(stem)
        group = numbers.get(match[1], set()) if match else set()
        if match is None or "0000" not in group or len(group) > MAX_CHANNELS:
            ids[name] = stem
        elif match[2] == "0000":
            ids[name] = match[1]
        else:
            channels.append(name)
    return FolderScanIds(ids, tuple(channels))


class ScanIndex:
    """Finds the scan that a cell of a table, or an entry of a split file, means."""

    def __init__(self, scans: Iterable[str]) -> None:
        self._exact = set(scans)
        self._folded: dict[str, set[str]] = {}
        for scan in self._exact:
            for key in {fold_id(scan), derive_pairing_key(scan)}:
                self._folded.setdefault(key, set()).add(scan)

    def find_scan(self, text: str) -> str | None:
        """The id of the scan, or None. A name with folder, suffix, channel or other case is
        recognised.

        Names as they are written go first, so that a scan whose name really ends in `_0000` is
        found.
        """
        if text in self._exact:
            return text
        whole = derive_scan_id(get_file_name(text), keep_channel=True)
        short = derive_scan_id(get_file_name(text))
        for name in (whole, short):
            if name in self._exact:
                return name
        for name in (whole, short):
            for key in (fold_id(name), derive_pairing_key(name)):
                found = self._folded.get(key, set())
                if len(found) == 1:
                    return next(iter(found))
        return None


def get_file_name(path: str) -> str:
    """File name of a path with separators of any system."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def list_some(names: Sequence[str], most: int = MAX_SHOWN) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
