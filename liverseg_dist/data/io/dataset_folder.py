"""The files of a data set's folder: found under slightly other names, and never left out without a
line.
"""

from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

from liverseg_dist.data.findings import Finding
from liverseg_dist.errors import printable
from liverseg_dist.texts.formats import UNSUPPORTED_FORMATS, describe_unread
from liverseg_dist.texts.names import clean_text, derive_scan_id, fold_id, is_scan_name, list_some

SUBFOLDERS = ("imagesTr", "imagesTs", "labelsTr")
MACOS_METADATA_PREFIX = "._"
"""macOS adds a file `._name` to each file it copies to a foreign disk."""


class FileFinder:
    """Finds the files that `dataset.json` names. Each folder is listed once."""

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, list[Path]]] = {}

    def find(self, path: Path) -> tuple[Path, str | None]:
        """(the file, why it is not there).

        A name that differs in the case or kind of its suffix, in the channel `_0000`, in Unicode
        form or case is taken for the file if there is exactly one such.
        """
        if is_file(path):
            return path, None
        found = self._listing(path.parent).get(fold_id(derive_scan_id(path.name)), [])
        if len(found) == 1:
            return found[0], None
        if found:
            names = list_some([clean_text(file.name) for file in found])
            return path, f"which does not exist, but several like it do ({names}); name one of them"
        return path, "which does not exist"

    def _listing(self, folder: Path) -> dict[str, list[Path]]:
        if folder not in self._folders:
            self._folders[folder] = {}
            for file in list_entries(folder):
                if is_scan_name(file.name) and is_file(file):
                    key = fold_id(derive_scan_id(file.name))
                    self._folders[folder].setdefault(key, []).append(file)
        return self._folders[folder]


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (
        OSError,
        ValueError,
    ):  # a name too long for the file system, or one that no file can have
        return False


def list_entries(folder: Path) -> list[Path]:
    """The entries of a folder, sorted; none where there is no such folder."""
    try:
        return sorted(folder.iterdir())
    except (OSError, ValueError):
        return []


def parse_relative_path(name: str) -> PurePosixPath | None:
    """A path of `dataset.json`, also with Windows separators; None if it leaves the folder or names
    no file.
    """
    windows = PureWindowsPath(name)
    path = PurePosixPath(name.replace("\\", "/"))
    if windows.drive or windows.root or path.is_absolute() or ".." in path.parts or not path.name:
        return None
    return path


def find_unread_files(folder: Path, used: Collection[Path], index: str | None) -> list[Finding]:
    """What lies in the folder and is not read.

    Args:
        folder: The data set.
        used: Images and labels of its cases.
        index: Name of the file that lists the scans, None where file names decide.
    """
    findings = []
    for part in SUBFOLDERS:
        scans, others, hidden = _sort_entries(folder / part, set(used))
        if scans and index is not None:
            text = f"{index} does not list {len(scans)} file(s) of {part}/, which are not read: {_names(scans)}"
            findings.append(Finding("warning", "unlisted", text))
        if others:
            findings += [
                Finding("warning", "unread_files", f"{part}/: {line}")
                for line in describe_unread(others)
            ]
        if hidden:
            text = f"{part}/: hidden files are not read: {_names(hidden)}; rename them"
            findings.append(Finding("warning", "unread_files", text))
    return [*findings, *_outside_parts(folder, set(used))]


def describe_contents(folder: Path) -> str:
    """What a folder without readable scans holds instead, to be told with the refusal; empty if
    nothing is known.
    """
    lines = []
    for part in ("", *SUBFOLDERS):
        scans, others, _ = _sort_entries(folder / part, set())
        known = [path for path in others if part or _has_known_suffix(path)]
        if scans and not part:
            lines.append(
                f"{len(scans)} scan(s) lie in the folder itself ({_names(scans)}); move them to imagesTr/"
            )
        lines += [f"{part}/: {line}" if part else line for line in describe_unread(known)]
    return "; ".join(lines)


def _outside_parts(folder: Path, used: set[Path]) -> list[Finding]:
    findings = []
    scans, others, _ = _sort_entries(folder, used)
    known = [path for path in others if _has_known_suffix(path)]
    if scans:
        text = f"{len(scans)} scan(s) in the folder itself are not read, only those in imagesTr/ and imagesTs/"
        findings.append(Finding("warning", "unread_files", f"{text}: {_names(scans)}"))
    findings += [Finding("warning", "unread_files", line) for line in describe_unread(known)]
    labels = [
        path
        for path in list_entries(folder / "labelsTs")
        if is_scan_name(path.name) and path not in used
    ]
    if labels:
        text = "labelsTs/ is read only where dataset.json names a label with a test scan"
        findings.append(Finding("warning", "unread_files", f"{text}; not read: {_names(labels)}"))
    return findings


def _sort_entries(folder: Path, used: set[Path]) -> tuple[list[Path], list[Path], list[Path]]:
    """(scans, other entries, hidden scans) of a folder that are not used."""
    scans, others, hidden = [], [], []
    for path in list_entries(folder):
        if path in used or path.name.startswith(MACOS_METADATA_PREFIX):
            continue
        if path.name.startswith("."):
            if is_scan_name(path.name.lstrip(".")) or _has_known_suffix(path):
                hidden.append(path)
        elif is_scan_name(path.name) and is_file(path):
            scans.append(path)
        else:
            others.append(path)
    return scans, others, hidden


def _has_known_suffix(path: Path) -> bool:
    return path.name.lower().endswith(tuple(UNSUPPORTED_FORMATS)) and not path.is_dir()


def _names(paths: Iterable[Path]) -> str:
    return list_some([printable(clean_text(path.name)) for path in paths])
