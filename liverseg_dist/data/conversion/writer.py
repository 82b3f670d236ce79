"""Writing cases and the root of a store: aside first, then one rename, so that what can be seen is whole."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from liverseg_dist.data.layout import ATTRIBUTE, CASES, CHUNK, compressors, ome_metadata, shard_shape
from liverseg_dist.volume import Grid

PRIVATE = ".liverseg"


@dataclass(frozen=True, eq=False)
class CaseArrays:
    """What is stored of one slab. `source_label` None: the case has no label."""

    image: np.ndarray
    label: np.ndarray
    source_label: np.ndarray | None
    foreground: np.ndarray
    grid: Grid
    attributes: dict[str, Any]


def write_case(store: Path, case_id: str, arrays: CaseArrays) -> dict[str, str]:
    """Write `cases/<case_id>`, replacing an older one; returns the SHA-256 of each of its files."""
    aside = store / PRIVATE / "aside" / f"{case_id}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    attributes = {"ome": ome_metadata(arrays.grid, case_id), ATTRIBUTE: arrays.attributes}
    group = zarr.create_group(str(aside), zarr_format=3, attributes=attributes)
    _put(group, "image", arrays.image, CHUNK, axes=True)
    _put(group, "label", arrays.label, CHUNK, axes=True)
    if arrays.source_label is not None:
        _put(group, "source_label", arrays.source_label, (32, 128, 128), axes=True)
    _put(group, "foreground", arrays.foreground, (max(1, len(arrays.foreground)), 5))
    sums = {str(path.relative_to(aside)): _synced_sha256(path) for path in sorted(aside.rglob("*")) if path.is_file()}
    final = store / CASES / case_id
    if final.exists():
        outdated = aside.with_name(aside.name + ".old")
        shutil.rmtree(outdated, ignore_errors=True)
        os.replace(final, outdated)
        os.replace(aside, final)
        shutil.rmtree(outdated, ignore_errors=True)
    else:
        os.replace(aside, final)
    return sums


def _put(group: zarr.Group, name: str, values: np.ndarray, chunk: tuple[int, ...], *, axes: bool = False) -> None:
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=chunk,
        shards=shard_shape(values.shape, chunk),
        compressors=compressors(values.dtype.itemsize),
        fill_value=0,
        dimension_names=("z", "y", "x") if axes else None,
        config={"write_empty_chunks": True},  # so that every chunk has a checksum to check
    )
    if values.size:
        array[...] = values


def write_root(store: Path, content: dict[str, Any]) -> None:
    """The root group with its attribute and consolidated metadata: the moment the store becomes readable."""
    group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    write_json(store / CASES / "zarr.json", group)
    metadata = {}
    for path in sorted(store.glob(f"{CASES}/**/zarr.json")):
        metadata[path.parent.relative_to(store).as_posix()] = json.loads(path.read_text(encoding="utf-8"))
    root = {
        **group,
        "attributes": {ATTRIBUTE: content},
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": metadata},
    }
    write_json(store / "zarr.json", root)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, sort_keys=False) + "\n")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        _synced_sha256(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _synced_sha256(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
