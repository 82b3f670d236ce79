"""Checks a store: checksums of all files, chunks of damaged arrays, metadata, splits and audit.

`liverseg verify` uses it. Damage is reported as `StoreDefect`s; the check goes on after each.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import zarr

from liverseg_dist.data.conversion.settings_match import settings_sha256
from liverseg_dist.data.loading.index_writer import find_index_defects
from liverseg_dist.data.splits import Splits, find_divided_patients
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.data.store.layout import (
    ARRAYS,
    CASES,
    CHECKSUM_FILE,
    INDEX_FILE,
    PRIVATE_DIR,
    TRAIN_ONLY,
)
from liverseg_dist.data.store.metadata_checks import check_array
from liverseg_dist.errors import UserError, printable
from liverseg_dist.files import file_sha256
from liverseg_dist.labels import IGNORE

MAX_CHUNKS_NAMED = 4
"""Damaged chunks of an array that are named; of more, only the number is given."""
MAX_CHUNKS_CHECKED = 1 << 20
"""Chunks of one array; the largest possible scan has a tenth of that."""


@dataclass(frozen=True)
class StoreDefect:
    """One damage. `case_id` is empty for the store as a whole."""

    case_id: str
    where: str
    what: str

    def __str__(self) -> str:
        case = f"case {self.case_id}, " if self.case_id else ""
        return printable(f"{case}{self.where}: {self.what}")


def verify_store(path: Path, on_case_done: Callable[[str], None]) -> list[StoreDefect]:
    """Find all damage of a store.

    Args:
        path: Folder of the store.
        on_case_done: Called with the id of each case that was checked.

    Returns:
        All damage found; empty for a correct store.

    Raises:
        UserError: `path` is not a store.
    """
    checksums, defects = _read_checksums(path)
    checksums_by_case: dict[str, dict[str, str]] = {}
    for name, sha256 in checksums.items():
        checksums_by_case.setdefault(_case_of_file(name), {})[name] = sha256
    case_ids = set(checksums_by_case)
    store = None
    try:
        store = CaseStore.open(path)
    except UserError as error:
        # Checksums and a root: a store with a damaged root. Its files can still be checked.
        if not checksums or not (path / "zarr.json").exists():
            raise
        defects.append(StoreDefect("", "zarr.json", str(error)))
    if store is not None:
        defects += _check_root(store)
        case_ids |= set(store.case_ids)
    for case_id in sorted(case_ids):
        case_checksums = checksums_by_case.get(case_id, {})
        if not case_id:
            defects += _check_files(path, case_id, case_checksums)
            continue
        defects += _verify_case(path, store, case_id, case_checksums, bool(checksums))
        on_case_done(case_id)
    defects += _find_unlisted_cases(path, case_ids)
    if store is not None:
        defects += _check_index(store, {defect.case_id for defect in defects})
    return defects


def _check_index(store: CaseStore, damaged: set[str]) -> Iterator[StoreDefect]:
    """Compare the loading index with the cases whose own files are undamaged."""
    # A checksum that has changed is reported already; damage of the root hides what belongs to it.
    if "" in damaged:
        return
    for case_id, what in find_index_defects(store, set(store.case_ids) - damaged):
        yield StoreDefect(case_id, INDEX_FILE, what)


def _verify_case(
    path: Path,
    store: CaseStore | None,
    case_id: str,
    checksums: dict[str, str],
    has_checksum_file: bool,
) -> list[StoreDefect]:
    """Damage of one case: its files, and its content if the files are undamaged."""
    defects = list(_check_files(path, case_id, checksums))
    if has_checksum_file:
        defects += _find_unlisted_files(path, case_id, checksums)
    else:
        defects += _check_chunks(path, case_id)
    # Content that disagrees is a consequence of damaged files; report the cause only.
    if store is not None and not defects:
        defects += _check_case(store, case_id)
    return defects


def _read_checksums(path: Path) -> tuple[dict[str, str], list[StoreDefect]]:
    """SHA-256 by file as the store was written, and damage of the list itself."""
    has_private_dir = (path / PRIVATE_DIR).is_dir()
    try:
        text = (path / CHECKSUM_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        # A copy may be without both; then each chunk's own checksum remains.
        if not has_private_dir:
            return {}, []
        what = "is missing; only the checksums inside the chunks can be checked"
        return {}, [StoreDefect("", CHECKSUM_FILE, what)]
    checksums, defects = {}, []
    for number, line in enumerate(text.splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line)
        # Names must not lead out of the store: they are opened below.
        if match and ".." not in Path(match[2]).parts and not Path(match[2]).is_absolute():
            checksums[match[2]] = match[1]
        else:
            defects.append(StoreDefect("", CHECKSUM_FILE, f"line {number} is damaged"))
    if "zarr.json" not in checksums:
        what = "does not list zarr.json; lines are missing"
        defects.append(StoreDefect("", CHECKSUM_FILE, what))
    if not has_private_dir:
        # A copy may leave out the state of the conversion, which readers do not need.
        checksums = {
            name: sha256 for name, sha256 in checksums.items() if not name.startswith(PRIVATE_DIR)
        }
    return checksums, defects


def _find_unlisted_cases(path: Path, case_ids: set[str]) -> Iterator[StoreDefect]:
    for folder in sorted((path / CASES).glob("*/")):
        if folder.name not in case_ids:
            what = "exists but is not listed by the store; convert again"
            yield StoreDefect(folder.name, f"{CASES}/{folder.name}", what)


def _find_unlisted_files(
    path: Path, case_id: str, checksums: dict[str, str]
) -> Iterator[StoreDefect]:
    """Files without checksum: a list that lost lines would otherwise look correct."""
    folder = path / CASES / case_id
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.relative_to(path).as_posix() not in checksums:
            name = file.relative_to(folder).as_posix()
            yield StoreDefect(case_id, name, f"is not listed in {CHECKSUM_FILE}")


def _case_of_file(name: str) -> str:
    """Case that a file of the store belongs to; empty for other files."""
    parts = name.split("/")
    return parts[1] if parts[0] == CASES and len(parts) > 2 else ""


def _check_files(path: Path, case_id: str, checksums: dict[str, str]) -> Iterator[StoreDefect]:
    """Compare files with their checksums."""
    for name, expected in sorted(checksums.items()):
        where = name.removeprefix(f"{CASES}/{case_id}/") if case_id else name
        try:
            is_unchanged = file_sha256(path / name) == expected
        except FileNotFoundError:
            yield StoreDefect(case_id, where, "is missing")
            continue
        except (OSError, ValueError) as error:
            # ValueError: a name that no file can have, such as one with a null character.
            reason = getattr(error, "strerror", None) or error
            yield StoreDefect(case_id, where, f"cannot be read ({reason})")
            continue
        if not is_unchanged:
            chunks = ""
            if case_id and "/c/" in where:
                damaged = list(_find_damaged_chunks(path / CASES / case_id, where.split("/")[0]))
                chunks = f", chunk {_list_chunks(damaged)}" if damaged else ""
            yield StoreDefect(case_id, where, f"has changed{chunks}")


def _check_chunks(path: Path, case_id: str) -> Iterator[StoreDefect]:
    """Decode every chunk of a case; used for stores without a checksum file."""
    for array in ARRAYS:
        chunks = list(_find_damaged_chunks(path / CASES / case_id, array))
        if chunks:
            yield StoreDefect(case_id, array, f"is damaged, chunk {_list_chunks(chunks)}")


def _list_chunks(chunks: list[str]) -> str:
    text = "; ".join(chunks[:MAX_CHUNKS_NAMED])
    if len(chunks) > MAX_CHUNKS_NAMED:
        # One damaged index makes all chunks of a shard unreadable.
        text += f"; and {len(chunks) - MAX_CHUNKS_NAMED} more (the shard's index?)"
    return text


def _find_damaged_chunks(folder: Path, name: str) -> Iterator[str]:
    """Index triples of chunks that cannot be decoded or fail their crc32c, with the reason."""
    try:
        array: Any = zarr.open_array(str(folder / name), mode="r")
        check_array(array, name)
        counts = [-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True)]
    except Exception as error:
        # zarr raises many types of errors for damaged metadata.
        if (folder / name).exists():
            yield f"(metadata: {type(error).__name__})"
        return
    if math.prod(counts) > MAX_CHUNKS_CHECKED:
        yield f"(metadata: {math.prod(counts):,} chunks)"
        return
    for index in itertools.product(*map(range, counts)):
        box = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, array.chunks, strict=True))
        try:
            array[box]
        except Exception as error:
            # Decoders raise many types of errors for damaged bytes.
            reason = " ".join(str(error).split())[:80]
            yield f"{','.join(map(str, index))} ({reason})"


def _check_root(store: CaseStore) -> Iterator[StoreDefect]:
    """Compare the parts of the root with each other."""
    root = store.root
    try:
        yield from _check_splits(store)
        yield from _check_audit(store)
        if settings_sha256(root["convert"]) != root["convert_sha256"]:
            yield StoreDefect("", "zarr.json", "the recorded settings do not match their hash")
        store.intensity  # noqa: B018 - raises when it is not valid
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        yield StoreDefect("", "zarr.json", f"metadata is damaged ({reason})")


def _check_splits(store: CaseStore) -> Iterator[StoreDefect]:
    """Every case is in one part at most, and no patient is in several parts."""
    case_ids, content = set(store.case_ids), store.root["splits"]
    splits = Splits(tuple(content["test"]), tuple(map(tuple, content["folds"])))
    imputed = list(content.get(TRAIN_ONLY, []))
    named = [*splits.test, *itertools.chain.from_iterable(splits.folds), *imputed]
    for case_id, times in sorted(Counter(named).items()):
        if times > 1:
            yield StoreDefect(case_id, "splits", "is in more than one part")
    for case_id in sorted(set(named) - case_ids):
        yield StoreDefect(case_id, "splits", "is in a part but not stored")
    for case_id in sorted(case_ids & set(named)):
        meta = store.meta(case_id)
        if not meta.labelled:
            yield StoreDefect(case_id, "splits", "is in a part but has no label")
        if meta.imputed != (case_id in imputed):
            what = f"cases labelled by a run must be in {TRAIN_ONLY}, other cases must not"
            yield StoreDefect(case_id, "splits", what)
    # Other kinds of splits come from a file; its author is responsible for the patients.
    if store.convert.splits.kind == "stratified" and case_ids >= set(named):
        patients = {case_id: store.meta(case_id).patient for case_id in case_ids}
        for patient in find_divided_patients(splits, patients):
            what = f"scans of the patient of {patient} are in several parts"
            yield StoreDefect("", "splits", what)


def _check_audit(store: CaseStore) -> Iterator[StoreDefect]:
    """Cases and audit entries refer to each other."""
    case_ids, audit = set(store.case_ids), store.root["audit"]
    for case_id in sorted(case_ids):
        if case_id not in audit[store.meta(case_id).parent]["stored_as"]:
            yield StoreDefect(case_id, "audit", "the entry of its scan does not name it")
    for scan, entry in audit.items():
        for case_id in sorted(set(entry["stored_as"]) - case_ids):
            what = f"is named by the entry of {scan} but not stored"
            yield StoreDefect(case_id, "audit", what)


def _check_case(store: CaseStore, case_id: str) -> Iterator[StoreDefect]:
    """Compare the arrays of a case with its metadata; for cases with correct checksums."""
    try:
        meta = store.meta(case_id)
        label, rows = store.label(case_id), store.foreground(case_id)
        # Reading checks shape and type of an array against the metadata.
        store.image(case_id)
        if meta.labelled:
            store.source_label(case_id)
    except Exception as error:
        # Decoders raise many types of errors for damaged bytes.
        reason = " ".join(str(error).removeprefix(f"{store.path}: ").split())
        yield StoreDefect(case_id, CASES, f"cannot be read ({reason[:160]})")
        return
    # Correct checksums do not exclude that the writer itself stored contradicting values.
    counts = np.bincount(label.ravel(), minlength=256)
    classes = store.labels.num_classes
    if tuple(counts[:classes].tolist()) != meta.class_voxels:
        yield StoreDefect(case_id, "label", "its voxels per class differ from the recorded numbers")
    if counts[classes:IGNORE].any():
        known = f"0 to {classes - 1}, and {IGNORE}"
        yield StoreDefect(case_id, "label", f"contains values other than {known}")
    for lesion in store.labels.lesions:
        mask = np.ascontiguousarray(store.labels.mask_of(label, lesion))
        count = int(cc3d.connected_components(mask, connectivity=26, return_N=True)[1])
        if count != meta.lesions[lesion.name]:
            what = (
                f"has {count} components of {lesion.name}, recorded are {meta.lesions[lesion.name]}"
            )
            yield StoreDefect(case_id, "label", what)
    first, last = meta.valid_slices
    if (label[:first] != IGNORE).any() or (label[last:] != IGNORE).any():
        yield StoreDefect(case_id, "label", "padding is not marked")
    if len(rows) and (label[tuple(rows[:, 2:].T)] != rows[:, 0]).any():
        what = "a sampled voxel has another class in the label"
        yield StoreDefect(case_id, "foreground", what)
