"""Does a store keep its promises? Every file's checksum, every chunk of a damaged one, metadata, splits, audit."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from liverseg_dist.data.conversion.case import CaseRecord, read_record
from liverseg_dist.data.conversion.pipeline import settings_sha256
from liverseg_dist.data.conversion.writer import sha256_file
from liverseg_dist.data.layout import ARRAYS, CASES
from liverseg_dist.data.store import CaseStore
from liverseg_dist.errors import UserError
from liverseg_dist.labels import IGNORE


@dataclass(frozen=True)
class Damage:
    """`case_id` empty: the store as a whole."""

    case_id: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{f'case {self.case_id}, ' if self.case_id else ''}{self.where}: {self.what}"


def verify_store(path: Path, done: Callable[[str], None]) -> list[Damage]:
    """All damage found; `done` is called with each case id. Raises `UserError` when `path` is no store at all."""
    store = CaseStore.open(path)
    found = list(_check_root(store))
    records = _records(path)
    for case_id in store.case_ids:
        found += _check_case(path, store, case_id, records.get(store.meta(case_id).parent))
        done(case_id)
    strangers = sorted(p.name for p in (path / CASES).iterdir() if p.is_dir() and p.name not in store.case_ids)
    found += [Damage(name, f"{CASES}/{name}", "is there but not listed by the store; convert again") for name in strangers]
    return found


def _records(path: Path) -> dict[str, CaseRecord]:
    files = sorted((path / ".liverseg" / "records").glob("*.json"))
    return {file.stem: record for file in files if (record := read_record(path, file.stem)) is not None}


def _check_root(store: CaseStore) -> Iterator[Damage]:
    ids, root = set(store.case_ids), store._root
    try:
        splits = root["splits"]
        named = [*splits["test"], *itertools.chain.from_iterable(splits["folds"])]
        for case_id in sorted({name for name in named if named.count(name) > 1}):
            yield Damage(case_id, "splits", "stands in more than one part")
        for case_id in sorted(set(named) - ids):
            yield Damage(case_id, "splits", "is named there but not stored")
        place = {case_id: number for number, part in enumerate([splits["test"], *splits["folds"]]) for case_id in part}
        patients: dict[str, set[int]] = {}
        for case_id in sorted(ids & place.keys()):
            patients.setdefault(store.meta(case_id).patient, set()).add(place[case_id])
        for patient, parts in patients.items():
            if len(parts) > 1:
                yield Damage("", "splits", f"scans of patient {patient} are on several sides")
        for case_id in sorted(ids):
            if store.meta(case_id).parent not in root["audit"]:
                yield Damage(case_id, "audit", "has no entry")
        if settings_sha256(store.convert) != root["convert_sha256"] and not root["convert"].get("spacing_table"):
            yield Damage("", "zarr.json", "the recorded settings do not match their hash")
        store.intensity  # noqa: B018 - raises when it is not valid
    except (KeyError, TypeError, ValueError, UserError) as error:
        yield Damage("", "zarr.json", f"metadata is damaged ({type(error).__name__}: {' '.join(str(error).split())[:120]})")


def _check_case(path: Path, store: CaseStore, case_id: str, record: CaseRecord | None) -> Iterator[Damage]:
    folder = path / CASES / case_id
    sums: dict[str, str] = {} if record is None else record.slabs.get(case_id, {}).get("files", {})
    if not sums:
        yield Damage(case_id, ".liverseg/records", "no record of its checksums; only the chunks' own are checked")
    damaged = set()
    for name, expected in sums.items():
        file = folder / name
        if not file.is_file():
            yield Damage(case_id, name, "is missing")
        elif sha256_file(file) != expected:
            array = name.split("/")[0]
            damaged.add(array)
            chunks = list(_bad_chunks(folder, array)) if array in ARRAYS and "/c/" in name else []
            yield Damage(case_id, name, f"has changed{', chunk ' + '; chunk '.join(chunks) if chunks else ''}")
    if not sums:
        for array in ARRAYS:
            for chunk in _bad_chunks(folder, array):
                damaged.add(array)
                yield Damage(case_id, array, f"chunk {chunk} is damaged")
    if not damaged:
        yield from _check_content(store, case_id)


def _bad_chunks(folder: Path, name: str) -> Iterator[str]:
    """Inner chunks that do not decode to what their checksum says, as index triples."""
    try:
        array: Any = zarr.open_array(str(folder / name), mode="r")
        counts = [-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True)]
    except Exception as error:  # a damaged zarr.json may fail in any way
        if (folder / name).exists():
            yield f"(metadata: {type(error).__name__})"
        return
    for index in itertools.product(*map(range, counts)):
        box = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, array.chunks, strict=True))
        try:
            array[box]
        except Exception as error:  # whatever a decoder makes of damaged bytes
            yield f"{','.join(map(str, index))} ({' '.join(str(error).split())[:80]})"


def _check_content(store: CaseStore, case_id: str) -> Iterator[Damage]:
    meta = store.meta(case_id)
    image, label = store.image(case_id), store.label(case_id)
    if image.shape != meta.grid.shape or label.shape != meta.grid.shape:
        yield Damage(case_id, "image", f"has shape {image.shape}, its metadata says {meta.grid.shape}")
        return
    counts = np.bincount(label.ravel(), minlength=256)
    if tuple(counts[:3].tolist()) != meta.class_voxels:
        yield Damage(case_id, "label", "its voxels per class are not those recorded")
    if counts[3:IGNORE].any():
        yield Damage(case_id, "label", "holds values besides 0, 1, 2 and 255")
    first, last = meta.valid_slices
    if meta.labelled and ((label[:first] != IGNORE).any() or (label[last:] != IGNORE).any()):
        yield Damage(case_id, "label", "padding is not marked")
    rows = store.foreground(case_id)
    if len(rows) and (label[tuple(rows[:, 2:].T)] != rows[:, 0]).any():
        yield Damage(case_id, "foreground", "a sampled voxel has another class in the label")

