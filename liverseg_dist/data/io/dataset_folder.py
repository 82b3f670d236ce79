"""The files of a data set's folder: found under similar names, and reported if they are not read.

`FileFinder` finds the files that `dataset.json` lists although suffix, channel number or Unicode
form differ. `find_unread_files` reports every other file that looks like a scan, so that no scan is
left out without a message.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from liverseg_dist.data.findings import Finding
from liverseg_dist.errors import printable
from liverseg_dist.texts.formats import UNSUPPORTED_FORMATS, describe_unread
from liverseg_dist.texts.names import clean_text, derive_scan_id, fold_id, is_scan_name, list_some

SUBFOLDERS = ("imagesTr", "imagesTs", "labelsTr")
TEST_LABELS_FOLDER = "labelsTs"
MACOS_METADATA_PREFIX = "._"
"""macOS adds a file `._name` to each file that it copies to a disk of another file system."""


class FileFinder:
    """Finds the files that `dataset.json` lists. Each folder is read once."""

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, list[Path]]] = {}

    def find_file(self, path: Path) -> tuple[Path, str | None]:
        """Find a listed file, also under a similar name.

        If there is no such file, exactly one file may differ in the suffix (.nii or .nii.gz, upper
        or lower case), in the channel number `_0000`, in the Unicode form or in case.

        Returns:
            The file and None, or `path` and the reason why it was not found.
        """
        if is_file(path):
            return path, None
        found = self._list_by_id(path.parent).get(fold_id(derive_scan_id(path.name)), [])
        if len(found) == 1:
            return found[0], None
        if found:
            names = list_some([clean_text(file.name) for file in found])
            return path, f"which does not exist, but several like it do ({names}); name one of them"
        return path, "which does not exist"

    def find_channels(self, path: Path, count: int) -> list[Path | None] | None:
        """Find the files `name_0000`, `name_0001`, ... of a listed scan `name` or `name_0000`.

        Returns:
            One entry per channel, None where a file is missing or ambiguous; None in all without
            any such file.
        """
        base = derive_scan_id(path.name)
        numbered = self._list_by_stem(path.parent)
        files: list[Path | None] = []
        for number in range(count):
            found = numbered.get(fold_id(f"{base}_{number:04d}"), [])
            files.append(found[0] if len(found) == 1 else None)
        return files if any(files) else None

    def _list_by_stem(self, folder: Path) -> dict[str, list[Path]]:
        """The scans of a folder by their names with channel numbers."""
        stems: dict[str, list[Path]] = {}
        for files in self._list_by_id(folder).values():
            for file in files:
                key = fold_id(derive_scan_id(file.name, keep_channel=True))
                stems.setdefault(key, []).append(file)
        return stems

    def _list_by_id(self, folder: Path) -> dict[str, list[Path]]:
        if folder not in self._folders:
            # Listing a folder once avoids a look-up per file on slow network file systems.
            self._folders[folder] = {}
            for file in list_entries(folder):
                if is_scan_name(file.name) and is_file(file):
                    key = fold_id(derive_scan_id(file.name))
                    self._folders[folder].setdefault(key, []).append(file)
        return self._folders[folder]


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    # The name is too long for the file system, or holds a character that no file name can have.
    except (OSError, ValueError):
        return False


def list_entries(folder: Path) -> list[Path]:
    """The entries of a folder, sorted; empty if there is no such folder."""
    try:
        return sorted(folder.iterdir())
    except (OSError, ValueError):
        return []


def parse_relative_path(name: str) -> PurePosixPath | None:
    """Parse a path of `dataset.json`, which may have Windows separators.

    Returns:
        None if the path leaves the folder or names no file.
    """
    # Drive letters and UNC paths are absolute on Windows only, but never valid here.
    windows = PureWindowsPath(name)
    path = PurePosixPath(name.replace("\\", "/"))
    if windows.drive or windows.root or path.is_absolute() or ".." in path.parts or not path.name:
        return None
    return path


@dataclass
class _FolderEntries:
    """Entries of a folder that no case uses."""

    scans: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    """Hidden files that would be scans under another name."""


def find_unread_files(folder: Path, used: Collection[Path], index: str | None) -> list[Finding]:
    """Report the scans, and files in other image formats, that are present but not read.

    Args:
        folder: The data set.
        used: Images and labels of its cases.
        index: Name of the file that lists the scans; None if cases are paired by file name.
    """
    used = set(used)
    findings = []
    for name in SUBFOLDERS:
        entries = _sort_entries(folder / name, used)
        if entries.scans and index is not None:
            message = (
                f"{index} does not list {len(entries.scans)} file(s) of {name}/, "
                f"which are not read: {_list_names(entries.scans)}"
            )
            findings.append(Finding("warning", "unlisted", message))
        for line in describe_unread(entries.others):
            findings.append(Finding("warning", "unread_files", f"{name}/: {line}"))
        if entries.hidden:
            names = _list_names(entries.hidden)
            message = f"{name}/: hidden files are not read: {names}; rename them"
            findings.append(Finding("warning", "unread_files", message))
    return [*findings, *_find_outside_subfolders(folder, used)]


def describe_contents(folder: Path) -> str:
    """Describe what a folder without readable scans holds, for the error message; may be empty."""
    lines = []
    entries = _sort_entries(folder, set())
    if entries.scans:
        lines.append(
            f"{len(entries.scans)} scan(s) are in the folder itself "
            f"({_list_names(entries.scans)}); move them to imagesTr/"
        )
    # The folder itself may hold anything; only files in known image formats are worth a line.
    lines += describe_unread(path for path in entries.others if _has_unsupported_suffix(path))
    for name in SUBFOLDERS:
        for line in describe_unread(_sort_entries(folder / name, set()).others):
            lines.append(f"{name}/: {line}")
    return "; ".join(lines)


def _find_outside_subfolders(folder: Path, used: set[Path]) -> list[Finding]:
    """Report scans in the folder itself and in labelsTs/."""
    findings = []
    entries = _sort_entries(folder, used)
    if entries.scans:
        message = (
            f"{len(entries.scans)} scan(s) in the folder itself are not read, only those in "
            f"imagesTr/ and imagesTs/: {_list_names(entries.scans)}"
        )
        findings.append(Finding("warning", "unread_files", message))
    for line in describe_unread(path for path in entries.others if _has_unsupported_suffix(path)):
        findings.append(Finding("warning", "unread_files", line))
    labels = []
    for path in list_entries(folder / TEST_LABELS_FOLDER):
        if is_scan_name(path.name) and path not in used:
            labels.append(path)
    if labels:
        message = (
            f"{TEST_LABELS_FOLDER}/ is read only if dataset.json names a label with a test scan; "
            f"not read: {_list_names(labels)}"
        )
        findings.append(Finding("warning", "unread_files", message))
    return findings


def _sort_entries(folder: Path, used: set[Path]) -> _FolderEntries:
    entries = _FolderEntries()
    for path in list_entries(folder):
        if path in used or path.name.startswith(MACOS_METADATA_PREFIX):
            continue
        # Hidden files are not read, but a hidden scan is probably a mistake of the user.
        if path.name.startswith("."):
            if is_scan_name(path.name.lstrip(".")) or _has_unsupported_suffix(path):
                entries.hidden.append(path)
        elif is_scan_name(path.name) and is_file(path):
            entries.scans.append(path)
        else:
            entries.others.append(path)
    return entries


def _has_unsupported_suffix(path: Path) -> bool:
    return path.name.lower().endswith(tuple(UNSUPPORTED_FORMATS)) and not path.is_dir()


def _list_names(paths: Iterable[Path]) -> str:
    return list_some([printable(clean_text(path.name)) for path in paths])
