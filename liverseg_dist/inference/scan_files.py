"""Find the scan files among the files and folders that a user gives to `liverseg predict`."""

from collections.abc import Sequence
from pathlib import Path

from liverseg_dist.errors import UserError, printable
from liverseg_dist.texts.formats import describe_unread
from liverseg_dist.texts.names import (
    assign_scan_ids,
    clean_text,
    derive_scan_id,
    fold_id,
    is_scan_name,
    list_some,
)


def find_scans(inputs: Sequence[Path], out: Path) -> dict[str, Path]:
    """The scan files by the id of their scan, in order.

    Args:
        inputs: files, and folders that contain scans.
        out: folder of the results.

    Raises:
        UserError: a folder holds no scan, two scans have the same id, or a scan is in `out`.
    """
    files: dict[str, Path] = {}
    by_folded_id: dict[str, Path] = {}
    for scan, file in _name_files(inputs):
        # The same file may be given twice, for example by name and with its folder.
        if scan in files and files[scan] == file:
            continue
        # Ids that differ only in case are one file on some file systems.
        other = by_folded_id.setdefault(fold_id(scan), file)
        if other != file:
            both = f"{printable(other)} and {printable(file)}"
            raise UserError(f"{both} would both become {scan}.nii.gz; give them different names")
        if file.parent.resolve() == out.resolve():
            raise UserError(
                f"{printable(file)}: lies in --out, where its mask would replace it; "
                "choose another --out"
            )
        files[scan] = file
    return files


def _name_files(inputs: Sequence[Path]) -> list[tuple[str, Path]]:
    """(id, file) of each scan; ids of files in a folder depend on the other files there."""
    named: list[tuple[str, Path]] = []
    for path in inputs:
        if not path.is_dir():
            # A missing file is an error of this scan only; the others are segmented.
            named.append((derive_scan_id(path.name), path))
            continue
        inside = _list_scan_files(path)
        if not inside:
            rest = "; ".join(describe_unread(list_visible_entries(path)))
            details = f" ({rest})" if rest else ""
            raise UserError(f"{printable(path)}: holds no .nii or .nii.gz file{details}")
        ids = assign_scan_ids(file.name for file in inside).ids
        for file in inside:
            if file.name in ids:
                named.append((ids[file.name], file))
    return named


def describe_skipped_files(inputs: Sequence[Path]) -> list[str]:
    """One line for each kind of file in the given folders that is not segmented."""
    lines = []
    for folder in inputs:
        if not folder.is_dir():
            continue
        scans = _list_scan_files(folder)
        others = [path for path in list_visible_entries(folder) if path not in scans]
        notes = describe_unread(others)
        channels = []
        for name in assign_scan_ids(file.name for file in scans).channels:
            channels.append(clean_text(name))
        if channels:
            notes.append(
                f"further channels of a scan are not read, a CT has one: {list_some(channels)}; "
                "if they are scans of their own, give the files or rename them"
            )
        for note in notes:
            lines.append(f"{printable(folder)}: {note}")
    return lines


def list_visible_entries(folder: Path) -> list[Path]:
    """The entries of a folder without hidden ones, sorted."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _list_scan_files(folder: Path) -> list[Path]:
    scans = []
    for path in list_visible_entries(folder):
        if is_scan_name(path.name) and not path.is_dir():
            scans.append(path)
    return scans
