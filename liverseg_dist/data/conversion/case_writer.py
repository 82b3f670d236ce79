"""Writing cases and the root of a store: aside first, then one rename, so that what can be seen is whole."""

import errno
import itertools
import json
import os
import shutil
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from liverseg_dist.data.store.layout import (
    ATTRIBUTE,
    CASES,
    FILL,
    IMAGE_CHUNK,
    LABEL_CHUNK,
    SOURCE_LABEL_CHUNK,
    make_compressors,
    ome_metadata,
    shard_shape,
)
from liverseg_dist.files import file_sha256
from liverseg_dist.volume import Grid

PRIVATE = ".liverseg"
ROOT = "__root__"
"""Owner of the files aside that are not a scan's; no scan may be called so (`data.msd`)."""
SUMS = "SHA256SUMS"
"""Checksum of every file of the store, as `sha256sum -c` reads it."""


_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class CaseArrays:
    """What is stored of one slab. `source_label` None: the case has no label."""

    image: np.ndarray
    label: np.ndarray
    source_label: np.ndarray | None
    foreground: np.ndarray
    grid: Grid
    attributes: dict[str, Any]


@dataclass(frozen=True)
class StagingDir:
    """Where files are written before they are moved to their place: a folder of the store, on the same file system.

    `owner`: a scan's id, or ROOT. Who holds that lock may `clear` what a killed process left there.
    """

    store: Path
    owner: str

    @property
    def folder(self) -> Path:
        return self.store / PRIVATE / "aside" / self.owner

    def new(self) -> Path:
        """A name nobody else uses, in a folder that is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{os.getpid()}.{next(_numbers)}.{socket.gethostname()}"

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def write_case(aside: StagingDir, case_id: str, arrays: CaseArrays) -> dict[str, str]:
    """Write `cases/<case_id>`, replacing an older one; returns the SHA-256 of each of its files."""
    folder = aside.new()
    attributes = {"ome": ome_metadata(arrays.grid, case_id), ATTRIBUTE: arrays.attributes}
    group = zarr.create_group(str(folder), zarr_format=3, attributes=attributes)
    _put(group, "image", arrays.image, IMAGE_CHUNK, axes=True)
    _put(group, "label", arrays.label, LABEL_CHUNK, axes=True)
    if arrays.source_label is not None:
        _put(group, "source_label", arrays.source_label, SOURCE_LABEL_CHUNK, axes=True)
    _put(group, "foreground", arrays.foreground, (max(1, len(arrays.foreground)), 5))
    sums = {path.relative_to(folder).as_posix(): _synced_sha256(path) for path in _files(folder)}
    _publish(folder, aside.store / CASES / case_id)
    return sums


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _put(
    group: zarr.Group, name: str, values: np.ndarray, chunk: tuple[int, ...], *, axes: bool = False
) -> None:
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=chunk,
        shards=shard_shape(values.shape, chunk),
        compressors=make_compressors(values.dtype.itemsize),
        fill_value=FILL[name],
        dimension_names=("z", "y", "x") if axes else None,
        config={"write_empty_chunks": True},  # so that every chunk has a checksum to check
    )
    if values.size:
        array[...] = values


def _publish(folder: Path, final: Path) -> None:
    """Move a finished folder to its name. Where locks do not work another writer may be quicker: ours replaces it."""
    outdated = folder.with_name(f"{folder.name}.old")
    final.parent.mkdir(parents=True, exist_ok=True)
    while True:
        shutil.rmtree(outdated, ignore_errors=True)
        with suppress(FileNotFoundError):
            os.rename(final, outdated)
        try:
            os.rename(folder, final)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    _sync_folder(final.parent)
    shutil.rmtree(outdated, ignore_errors=True)


def root_text(content: dict[str, Any]) -> str:
    """The root's `zarr.json`, with its attribute. The cases' metadata is not repeated in it (Zarr's consolidated
    metadata): with 10,000 cases that took three quarters of the file, and of the time to open it."""
    return json_text({"zarr_format": 3, "node_type": "group", "attributes": {ATTRIBUTE: content}})


def json_text(content: Any) -> str:
    """Raises ValueError for NaN and infinity, which JSON does not know."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


GROUP = json_text({"zarr_format": 3, "node_type": "group", "attributes": {}})


def write_text(aside: StagingDir, path: Path, text: str) -> None:
    write_bytes(aside, path, text.encode())


def write_bytes(aside: StagingDir, path: Path, content: bytes) -> None:
    """Whole or not at all; a file that holds these bytes already is left alone."""
    try:
        if path.read_bytes() == content:
            return
    except OSError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    part = aside.new()
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    _sync_folder(path.parent)


def _synced_sha256(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return file_sha256(path)


def _sync_folder(folder: Path) -> None:
    """The rename itself is on the disk when this returns, where the file system can say so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot sync a folder
        pass
    finally:
        os.close(descriptor)
