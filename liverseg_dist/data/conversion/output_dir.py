"""The output folder of a conversion: checks before it is written, and the files of its root."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from liverseg_dist.data.audit.audit_page import render_audit_page
from liverseg_dist.data.conversion.case_records import CaseRecord, record_file, thumbnail_file
from liverseg_dist.data.conversion.case_writer import (
    EMPTY_GROUP,
    ROOT_OWNER,
    STAGING,
    StagingDir,
    format_json,
    format_root,
    write_in_one_step,
    write_text,
)
from liverseg_dist.data.conversion.settings_match import list_setting_differences
from liverseg_dist.data.conversion.store_locks import StoreLocks
from liverseg_dist.data.loading.index_writer import has_complete_index, write_index
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.data.store.layout import CASES, CHECKSUM_FILE, INDEX_FILE, PRIVATE_DIR
from liverseg_dist.errors import UserError
from liverseg_dist.files import file_sha256
from liverseg_dist.locks import hold_lock

SETTINGS_FILE = f"{PRIVATE_DIR}/settings.json"
PRIVATE_SUBFOLDERS = ("records", "thumbnails", STAGING, "locks")
MAX_CHANGES_SHOWN = 4
MAX_SCANS_SHOWN = 3


def check_output_dir(store: Path) -> None:
    """Check that a conversion may write into a folder: it is absent, empty, or a store.

    Raises:
        UserError: The folder holds something else, or a folder of the store is a link.
    """
    folders = [CASES, PRIVATE_DIR]
    folders += [f"{PRIVATE_DIR}/{name}" for name in PRIVATE_SUBFOLDERS]
    for name in folders:
        # Conversion writes and deletes in these folders; a link would lead out of the store.
        if (store / name).is_symlink():
            raise UserError(
                f"{store / name}: is a symbolic link; a store must contain its own folders, "
                "remove the link"
            )
    if (store / PRIVATE_DIR).is_dir() or not store.exists():
        return
    if not store.is_dir() or any(store.iterdir()):
        raise UserError(
            f"{store}: exists and is not a store; give a new folder, nothing is overwritten"
        )


def check_settings_match(
    store: Path, wanted: dict[str, Any], scan_ids: Sequence[str], *, force: bool
) -> None:
    """Check that a store was made with these settings and scans, and record them for a new store.

    Args:
        store: Folder of the store.
        wanted: Settings of this conversion (`settings_that_must_match`).
        scan_ids: Scans of the data set.
        force: Replace the recorded settings instead of raising an error.

    Raises:
        UserError: The settings differ, or another conversion writes the store with other settings.
    """
    path = store / SETTINGS_FILE
    before = _read_json(path)
    removed = sorted(_recorded_scans(store) - set(scan_ids))
    changes = list_setting_differences(before, wanted) if path.exists() else []
    if removed:
        shown = ", ".join(removed[:MAX_SCANS_SHOWN])
        changes.append(f"{len(removed)} of its scans are not in this data set ({shown})")
    if changes and not force:
        shown = "; ".join(changes[:MAX_CHANGES_SHOWN])
        more = " ..." if len(changes) > MAX_CHANGES_SHOWN else ""
        raise UserError(
            f"{store}: made with other settings: {shown}{more}. "
            "Give another folder, or convert the affected scans again with --force"
        )
    if before == wanted and not removed:
        return
    locks = StoreLocks(store / PRIVATE_DIR)
    try:
        # Exclusive only if no conversion runs with the old settings.
        with hold_lock(locks.sessions, wait=False), hold_lock(locks.root):
            # The root describes the old settings: without it no reader opens a mixed store.
            (store / "zarr.json").unlink(missing_ok=True)
            write_text(StagingDir(store, ROOT_OWNER), path, format_json(wanted))
    except BlockingIOError:
        raise UserError(
            f"{store}: another conversion writes it with other settings; wait until it ends"
        ) from None


def remove_orphans(store: Path, records: Sequence[CaseRecord]) -> None:
    """Remove case folders, records and pictures that belong to no scan of the data set."""
    stored: set[str] = set()
    for record in records:
        stored |= record.slabs.keys()
    for folder in (store / CASES).glob("*/"):
        if folder.name not in stored:
            shutil.rmtree(folder, ignore_errors=True)
    for scan_id in _recorded_scans(store) - {record.case_id for record in records}:
        record_file(store, scan_id).unlink(missing_ok=True)
        thumbnail_file(store, scan_id).unlink(missing_ok=True)


def write_root_files(
    store: Path, content: dict[str, Any], records: Sequence[CaseRecord], *, is_locked: bool
) -> None:
    """Write the group of the cases, audit page, loading index, checksums and, last, the root.

    Args:
        store: Folder of the store.
        content: The root attribute (`root_metadata.build_root`).
        records: Records of all scans.
        is_locked: Whether this process holds the lock of the root and may remove staged files.

    Raises:
        OSError: The store cannot be written.
    """
    staging = StagingDir(store, ROOT_OWNER)
    if is_locked:
        staging.remove()
    write_text(staging, store / CASES / "zarr.json", EMPTY_GROUP)
    thumbnails = {record.case_id: thumbnail_file(store, record.case_id) for record in records}
    write_text(staging, store / "audit.html", render_audit_page(content, thumbnails))
    indexed = CaseStore(str(store), content)
    # The hash of the content decides: a second run of a finished conversion writes nothing.
    if not has_complete_index(indexed):
        write_in_one_step(staging, store / INDEX_FILE, partial(write_index, indexed))
    root = format_root(content)
    write_text(staging, store / CHECKSUM_FILE, _format_checksums(store, records, root))
    # A reader recognises a complete store by its root, so the root is the last file.
    write_text(staging, store / "zarr.json", root)
    if is_locked:
        staging.remove()


def _format_checksums(store: Path, records: Iterable[CaseRecord], root: str) -> str:
    """Text of SHA256SUMS, as `sha256sum -c` reads it."""
    checksums = {"zarr.json": hashlib.sha256(root.encode()).hexdigest()}
    other_files = [
        store / CASES / "zarr.json",
        store / "audit.html",
        store / INDEX_FILE,
        store / SETTINGS_FILE,
    ]
    for record in records:
        # Checksums of arrays come from the records; the arrays are not read again.
        for case_id, stored in record.slabs.items():
            for name, sha256 in stored.files.items():
                checksums[f"{CASES}/{case_id}/{name}"] = sha256
        for path in (record_file(store, record.case_id), thumbnail_file(store, record.case_id)):
            if path.exists():
                other_files.append(path)
    for path in other_files:
        checksums[path.relative_to(store).as_posix()] = file_sha256(path)
    return "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(checksums.items()))


def _recorded_scans(store: Path) -> set[str]:
    return {path.stem for path in (store / PRIVATE_DIR / "records").glob("*.json")}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
