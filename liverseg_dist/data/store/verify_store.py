"""Does a store keep its promises? Every file's checksum, every chunk of a damaged one, metadata, splits, audit."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from liverseg_dist.data.conversion.case_writer import PRIVATE, SUMS
from liverseg_dist.data.conversion.settings_match import settings_sha256
from liverseg_dist.data.splits import Splits, patients_in_several_parts
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.data.store.layout import ARRAYS, CASES, TRAIN_ONLY
from liverseg_dist.data.store.metadata_checks import check_array
from liverseg_dist.errors import UserError, printable
from liverseg_dist.files import file_sha256
from liverseg_dist.labels import IGNORE

MOST_CHUNKS = 4
"""Damaged chunks of an array that are named; of more only the number is."""


MOST_CHECKED = 1 << 20
"""Chunks of an array: a scan of the largest size has a tenth of that."""


@dataclass(frozen=True)
class StoreDefect:
    """`case_id` empty: the store as a whole."""

    case_id: str
    where: str
    what: str

    def __str__(self) -> str:
        return printable(
            f"{f'case {self.case_id}, ' if self.case_id else ''}{self.where}: {self.what}"
        )


def verify_store(path: Path, done: Callable[[str], None]) -> list[StoreDefect]:
    """All damage found; `done` is called with each case id. Raises `UserError` when `path` is no store at all."""
    sums, found = _read_sums(path)
    by_case: dict[str, dict[str, str]] = {}
    for name, digest in sums.items():
        by_case.setdefault(_case_of(name), {})[name] = digest
    cases = set(by_case)
    store = None
    try:
        store = CaseStore.open(path)
    except UserError as error:
        if not sums or not (path / "zarr.json").exists():
            raise
        found.append(StoreDefect("", "zarr.json", str(error)))
    if store is not None:
        found += _check_root(store)
        cases |= set(store.case_ids)
    for case_id in sorted(cases):
        listed = by_case.get(case_id, {})
        damaged = list(_check_files(path, case_id, listed))
        if case_id and sums:
            damaged += _unlisted(path, case_id, listed)
        if case_id and not sums:
            damaged += _check_chunks(path, case_id)
        if case_id and store is not None and not damaged:
            damaged += _check_case(store, case_id)
        found += damaged
        if case_id:
            done(case_id)
    found += [
        StoreDefect(
            p.name, f"{CASES}/{p.name}", "is there but not listed by the store; convert again"
        )
        for p in sorted((path / CASES).glob("*/"))
        if p.name not in cases
    ]
    return found


def _read_sums(path: Path) -> tuple[dict[str, str], list[StoreDefect]]:
    """File -> SHA-256 as the store was written."""
    try:
        text = (path / SUMS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        if not (path / PRIVATE).is_dir():
            return {}, []
        return {}, [
            StoreDefect("", SUMS, "is missing; only what each chunk carries can be checked")
        ]
    sums, found = {}, []
    for number, line in enumerate(text.splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line)
        if match and ".." not in Path(match[2]).parts and not Path(match[2]).is_absolute():
            sums[match[2]] = match[1]
        else:
            found.append(StoreDefect("", SUMS, f"line {number} is damaged"))
    if "zarr.json" not in sums:
        found.append(StoreDefect("", SUMS, "does not list zarr.json; lines are missing"))
    if not (path / PRIVATE).is_dir():  # a copy without what only conversion needs
        sums = {name: digest for name, digest in sums.items() if not name.startswith(PRIVATE)}
    return sums, found


def _unlisted(path: Path, case_id: str, sums: dict[str, str]) -> Iterator[StoreDefect]:
    """Of a list that lost lines the rest would still be right."""
    folder = path / CASES / case_id
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.relative_to(path).as_posix() not in sums:
            yield StoreDefect(
                case_id, file.relative_to(folder).as_posix(), f"is not listed in {SUMS}"
            )


def _case_of(name: str) -> str:
    parts = name.split("/")
    return parts[1] if parts[0] == CASES and len(parts) > 2 else ""


def _check_files(path: Path, case_id: str, sums: dict[str, str]) -> Iterator[StoreDefect]:
    for name, expected in sorted(sums.items()):
        file, where = path / name, name.removeprefix(f"{CASES}/{case_id}/") if case_id else name
        try:
            right = file_sha256(file) == expected
        except FileNotFoundError:
            yield StoreDefect(case_id, where, "is missing")
            continue
        except (OSError, ValueError) as error:  # a name that cannot be is a ValueError
            yield StoreDefect(
                case_id, where, f"cannot be read ({getattr(error, 'strerror', None) or error})"
            )
            continue
        if not right:
            array = where.split("/")[0]
            chunks = (
                _named(list(_bad_chunks(path / CASES / case_id, array)))
                if case_id and "/c/" in where
                else ""
            )
            yield StoreDefect(case_id, where, f"has changed{f', chunk {chunks}' if chunks else ''}")


def _check_chunks(path: Path, case_id: str) -> Iterator[StoreDefect]:
    for array in ARRAYS:
        chunks = list(_bad_chunks(path / CASES / case_id, array))
        if chunks:
            yield StoreDefect(case_id, array, f"is damaged, chunk {_named(chunks)}")


def _named(chunks: list[str]) -> str:
    more = (
        f"; and {len(chunks) - MOST_CHUNKS} more (the shard's index?)"
        if len(chunks) > MOST_CHUNKS
        else ""
    )
    return "; ".join(chunks[:MOST_CHUNKS]) + more


def _bad_chunks(folder: Path, name: str) -> Iterator[str]:
    """Inner chunks that do not decode to what their checksum says, as index triples."""
    try:
        array: Any = zarr.open_array(str(folder / name), mode="r")
        check_array(array, name)
        counts = [-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True)]
    except Exception as error:  # a damaged zarr.json may fail in any way
        if (folder / name).exists():
            yield f"(metadata: {type(error).__name__})"
        return
    if math.prod(counts) > MOST_CHECKED:
        yield f"(metadata: {math.prod(counts):,} chunks)"
        return
    for index in itertools.product(*map(range, counts)):
        box = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, array.chunks, strict=True))
        try:
            array[box]
        except Exception as error:  # whatever a decoder makes of damaged bytes
            yield f"{','.join(map(str, index))} ({' '.join(str(error).split())[:80]})"


def _check_root(store: CaseStore) -> Iterator[StoreDefect]:
    ids, root = set(store.case_ids), store.root
    try:
        splits = Splits(tuple(root["splits"]["test"]), tuple(map(tuple, root["splits"]["folds"])))
        imputed = list(root["splits"].get(TRAIN_ONLY, []))
        named = [*splits.test, *itertools.chain.from_iterable(splits.folds), *imputed]
        for case_id in sorted(name for name, times in Counter(named).items() if times > 1):
            yield StoreDefect(case_id, "splits", "stands in more than one part")
        for case_id in sorted(set(named) - ids):
            yield StoreDefect(case_id, "splits", "is named there but not stored")
        for case_id in sorted(ids & set(named)):
            if not store.meta(case_id).labelled:
                yield StoreDefect(case_id, "splits", "stands there without a label")
            if store.meta(case_id).imputed != (case_id in imputed):
                yield StoreDefect(
                    case_id,
                    "splits",
                    f"what a run labelled stands under {TRAIN_ONLY}, and nothing else does",
                )
        if store.convert.splits.kind == "stratified" and ids >= set(named):
            for patient in patients_in_several_parts(
                splits, {case_id: store.meta(case_id).patient for case_id in ids}
            ):
                yield StoreDefect(
                    "", "splits", f"scans of the patient of {patient} are on several sides"
                )
        for case_id in sorted(ids):
            if case_id not in root["audit"][store.meta(case_id).parent]["stored_as"]:
                yield StoreDefect(case_id, "audit", "its scan's entry does not name it")
        for scan, entry in root["audit"].items():
            for case_id in sorted(set(entry["stored_as"]) - ids):
                yield StoreDefect(
                    case_id, "audit", f"is named by the entry of {scan} but not stored"
                )
        if settings_sha256(root["convert"]) != root["convert_sha256"]:
            yield StoreDefect("", "zarr.json", "the recorded settings do not match their hash")
        store.intensity  # noqa: B018 - raises when it is not valid
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        yield StoreDefect("", "zarr.json", f"metadata is damaged ({reason})")


def _check_case(store: CaseStore, case_id: str) -> Iterator[StoreDefect]:
    """Do arrays and metadata agree? Called for a case whose files are as they were written."""
    try:
        meta = store.meta(case_id)
        label, rows = store.label(case_id), store.foreground(case_id)
        store.image(case_id)  # reading raises where an array is not what is promised
        if meta.labelled:
            store.source_label(case_id)
    except Exception as error:  # whatever a decoder makes of damaged bytes
        said = " ".join(str(error).removeprefix(f"{store.path}: ").split())
        yield StoreDefect(case_id, CASES, f"cannot be read ({said[:160]})")
        return
    counts = np.bincount(label.ravel(), minlength=256)
    if tuple(counts[:3].tolist()) != meta.class_voxels:
        yield StoreDefect(case_id, "label", "its voxels per class are not those recorded")
    if counts[3:IGNORE].any():
        yield StoreDefect(case_id, "label", "holds values besides 0, 1, 2 and 255")
    first, last = meta.valid_slices
    if (label[:first] != IGNORE).any() or (label[last:] != IGNORE).any():
        yield StoreDefect(case_id, "label", "padding is not marked")
    if len(rows) and (label[tuple(rows[:, 2:].T)] != rows[:, 0]).any():
        yield StoreDefect(case_id, "foreground", "a sampled voxel has another class in the label")
