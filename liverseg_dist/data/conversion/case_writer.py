"""Writes cases and the root of a store, so that each visible file is complete.

Everything is written into a staging folder of the store first, synchronised to the disk, and then
moved to its final name by one rename. A process that is killed leaves staged files only, which the
next conversion removes.
"""

import errno
import itertools
import json
import os
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zarr

from liverseg_dist.data.conversion.stored_case import StoredCase
from liverseg_dist.data.store.layout import (
    ATTRIBUTE,
    CASES,
    FILL,
    IMAGE_CHUNK,
    LABEL_CHUNK,
    PRIVATE_DIR,
    SOURCE_LABEL_CHUNK,
    make_compressors,
    ome_metadata,
    shard_shape,
)
from liverseg_dist.files import file_sha256

ROOT_OWNER = "__root__"
"""Owner of the staged files that belong to no scan; not a valid scan id
(`findings.is_valid_case_id`)."""
STAGING = "aside"
"""Name of the staging folder; part of the store format of earlier versions, so it stays."""

_staging_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class CaseArrays:
    """Arrays and metadata of one slab, as they are stored.

    `image` int16 (c, 64, y, x) and `label` uint8 (64, y, x); `source_label` uint8 on the scan's own grid,
    None for a case without label; `foreground` int16 (n, 5).
    """

    image: np.ndarray
    label: np.ndarray
    source_label: np.ndarray | None
    foreground: np.ndarray
    stored: StoredCase


@dataclass(frozen=True)
class StagingDir:
    """A folder of the store for incomplete files, on the same file system as their target.

    `owner`: a scan's id, or ROOT_OWNER. The holder of the owner's lock may remove files that a
    killed process left here.
    """

    store: Path
    owner: str

    @property
    def folder(self) -> Path:
        return self.store / PRIVATE_DIR / STAGING / self.owner

    def new_path(self) -> Path:
        """An unused path in the staging folder, unique over threads, processes and machines."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{os.getpid()}.{next(_staging_numbers)}.{socket.gethostname()}"

    def remove(self) -> None:
        """Remove the folder with everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_case(staging: StagingDir, case_id: str, arrays: CaseArrays) -> dict[str, str]:
    """Write `cases/<case_id>`, replacing an older version.

    Returns:
        SHA-256 of each file, by its path in the case's folder.
    """
    folder = staging.new_path()
    stored = arrays.stored
    attributes = {"ome": ome_metadata(stored.grid, case_id), ATTRIBUTE: stored.to_attributes()}
    group = zarr.create_group(str(folder), zarr_format=3, attributes=attributes)
    _write_array(group, "image", arrays.image, IMAGE_CHUNK, axes="czyx")
    _write_array(group, "label", arrays.label, LABEL_CHUNK, axes="zyx")
    if arrays.source_label is not None:
        _write_array(group, "source_label", arrays.source_label, SOURCE_LABEL_CHUNK, axes="zyx")
    _write_array(group, "foreground", arrays.foreground, (max(1, len(arrays.foreground)), 5))
    # Every file is on the disk before the case becomes visible: a crash cannot leave a partial
    # case.
    checksums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            checksums[path.relative_to(folder).as_posix()] = _sync_and_hash(path)
    _publish_folder(folder, staging.store / CASES / case_id)
    return checksums


def _write_array(
    group: zarr.Group,
    name: str,
    values: np.ndarray,
    chunk: tuple[int, ...],
    *,
    axes: str = "",
) -> None:
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=chunk,
        shards=shard_shape(values.shape, chunk),
        compressors=make_compressors(values.dtype.itemsize),
        fill_value=FILL[name],
        dimension_names=tuple(axes) or None,
        # Chunks that equal the fill value are written too, so that every chunk has a checksum.
        config={"write_empty_chunks": True},
    )
    # A case without foreground has no rows to write.
    if values.size:
        array[...] = values


def _publish_folder(folder: Path, final: Path) -> None:
    """Move a complete folder to its final name, replacing a folder that has this name."""
    outdated = folder.with_name(f"{folder.name}.old")
    final.parent.mkdir(parents=True, exist_ok=True)
    # Without working locks another process may publish the same case between the two renames.
    # Both wrote the same bytes, so try again until the rename succeeds.
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


def format_root(content: dict[str, Any]) -> str:
    """Text of the root's `zarr.json` with the attribute `liverseg`.

    Zarr's consolidated metadata is left out: with 10,000 cases it took three quarters of the file
    and of the time to open it.
    """
    return format_json({"zarr_format": 3, "node_type": "group", "attributes": {ATTRIBUTE: content}})


def format_json(content: Any) -> str:
    """JSON text of a store's file.

    Raises:
        ValueError: `content` holds NaN or infinity, which JSON cannot represent.
    """
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


EMPTY_GROUP = format_json({"zarr_format": 3, "node_type": "group", "attributes": {}})


def write_text(staging: StagingDir, path: Path, text: str) -> None:
    """Write a text file (UTF-8) in one step; see `write_bytes`."""
    write_bytes(staging, path, text.encode())


def write_bytes(staging: StagingDir, path: Path, content: bytes) -> None:
    """Write a file in one step: readers see the old or the new content, never a part.

    A file that already has this content is not written again.
    """
    try:
        if path.read_bytes() == content:
            return
    except OSError:
        pass
    write_in_one_step(staging, path, lambda file: file.write(content))


def write_in_one_step(staging: StagingDir, path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file with `write` in the staging folder, and then give it its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = staging.new_path()
    with staged.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
    _sync_folder(path.parent)


def _sync_and_hash(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return file_sha256(path)


def _sync_folder(folder: Path) -> None:
    """Synchronise a rename to the disk, where the file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network file systems cannot synchronise a folder; the rename itself is still atomic.
        pass
    finally:
        os.close(descriptor)
