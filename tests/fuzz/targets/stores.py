"""A converted store with damage in its metadata, its shards, its checksums; read by every reader of ours."""

import json
import math
import os
from pathlib import Path
from random import Random
from typing import Any

import google_crc32c
import numpy as np
import zarr

from liverseg_dist.config import DataConfig
from liverseg_dist.data.loading.array_reader import StoreReader
from liverseg_dist.data.loading.case_source import PatchSource
from liverseg_dist.data.loading.shard_reader import ChunkError
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.data.store.verify_store import verify_store
from liverseg_dist.errors import RunFailed, UserError
from tests.data.sources import convert, write_source
from tests.fuzz.judge import Wrong
from tests.fuzz.mutate import damaged, damaged_json

ARRAYS = ("image", "label", "source_label", "foreground")


class StoreTarget:
    """Opens it, reads all of it twice over, samples it, verifies it; zarr-python is the independent reader."""

    name = "store"

    def __init__(self, folder: Path) -> None:
        source = write_source(folder / "source", cases=3, shape=(66, 24, 28))
        self.whole = folder / "store.zarr"
        code, _ = convert(
            source, self.whole, "convert.splits.folds=2", "convert.splits.test_fraction=0.3"
        )
        assert code == 0
        self.files = sorted(
            p for p in self.whole.rglob("*") if p.is_file() and ".liverseg" not in p.parts
        )

    def make(self, case: Path, chance: Random) -> None:
        store = case / "store.zarr"
        for path in self.files:
            copy = store / path.relative_to(self.whole)
            copy.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, copy)
        names = [p.relative_to(self.whole).as_posix() for p in self.files]
        metadata = [name for name in names if name.endswith("zarr.json") and "/" in name]
        shards = [name for name in names if "/c/" in name]
        wanted = chance.choice(
            (["zarr.json"], ["zarr.json"], metadata, metadata, shards, ["SHA256SUMS"], names)
        )
        file = store / chance.choice(wanted)
        raw = file.read_bytes()
        if file.name == "zarr.json":
            raw = damaged_json(json.loads(raw), chance)
        elif "/c/" in file.as_posix() and chance.random() < 0.5:
            raw = signed(raw, chance)
        else:
            raw = damaged(raw, chance)
        file.unlink()  # a link: the original stays
        if chance.random() > 0.03:
            file.write_bytes(raw)

    def check(self, case: Path) -> None:
        path = case / "store.zarr"
        problems = []
        try:
            self._verify(path)
        except (UserError, RunFailed) as error:
            problems.append(error)
        for read in (self._arrays, self._samples, self._whole):
            try:
                read(path)
            except (UserError, RunFailed) as error:
                problems.append(error)
            except ChunkError as error:
                problems.append(RunFailed(str(error)))
        if problems:
            raise problems[0]

    def _verify(self, path: Path) -> None:
        found = verify_store(path, lambda case_id: None)
        for damage in found:
            if not str(damage).isprintable():
                raise Wrong(f"control characters get through: {damage!s:.300}")
        changed = (_content(path / f.relative_to(self.whole)) != _content(f) for f in self.files)
        if not found and (path / "SHA256SUMS").exists() and any(changed):
            raise Wrong("verify finds nothing")

    def _whole(self, path: Path) -> None:
        store = CaseStore.open(path)
        for read in ("name", "spacing_mm", "intensity", "convert", "audit", "class_voxels"):
            getattr(store, read)
        for part in ("train", "validation", "test"):
            for fold in (0, 1, "all"):
                store.ids(part, fold)  # type: ignore[arg-type]
        for case_id in store.case_ids:
            store.meta(case_id)
            for name in ARRAYS:
                if name == "source_label" and not store.meta(case_id).labelled:
                    continue
                ours = getattr(store, name)(case_id)
                theirs = self._zarr(path, f"cases/{case_id}/{name}")
                # An image of schema 1 has no axis of channels.
                if theirs is not None and theirs.ndim == ours.ndim - 1:
                    theirs = theirs[None]
                if theirs is not None and not np.array_equal(ours, theirs):
                    raise Wrong(
                        f"zarr-python reads other voxels of {case_id}/{name} ({theirs.shape}, ours {ours.shape})"
                    )

    def _arrays(self, path: Path) -> None:
        reader = StoreReader(path)
        try:
            for case_id in ("liver_0", "liver_1", "liver_2"):
                for name in ("image", "label"):
                    array = reader.open_array(case_id, name)
                    box = tuple(min(n, 70) for n in array.shape)
                    if min(array.shape) < 1:
                        raise UserError("an empty array")
                    ours = np.empty(box, np.int16 if name == "image" else np.uint8)
                    array.read_box((0,) * len(box), ours)
                    theirs = self._zarr(path, f"cases/{case_id}/{name}", box)
                    if theirs is not None and theirs.ndim == ours.ndim - 1:
                        theirs = theirs[None]
                    if theirs is not None and not np.array_equal(ours, theirs):
                        raise Wrong(
                            f"zarr-python reads other voxels of {case_id}/{name} than the loader"
                        )
        finally:
            reader.close()

    def _samples(self, path: Path) -> None:
        store = CaseStore.open(path)
        settings = DataConfig(store=str(path), patch_size=(16, 16, 16), augmentation="none")
        source = PatchSource(store, store.ids("train", 0), settings, seed=1, global_batch_size=2)
        try:
            for index in range(4):
                source.read_sample(index)
        finally:
            source.close()

    def _zarr(self, path: Path, name: str, box: tuple[int, ...] | None = None) -> np.ndarray | None:
        """What zarr-python reads; None where it cannot, or must not be asked (it believes any size)."""
        try:
            if box is None:  # through the root, which holds the metadata of all arrays
                array: Any = zarr.open_group(str(path), mode="r")[name]
            else:
                array = zarr.open_array(str(path), path=name, mode="r")
            if (
                math.prod(array.shape) > 1 << 24
                or math.prod(array.shards or array.chunks) > 1 << 24
            ):
                return None
            return np.asarray(array[tuple(map(slice, box))] if box else array[...])
        except Exception:
            return None


def _content(path: Path) -> bytes:
    """Without checksums of conversion's own files, which are not in this copy."""
    lines = path.read_bytes().splitlines(keepends=True)
    private = b"  .liverseg/" if path.name == "SHA256SUMS" else b"\0\0none"
    return b"".join(line for line in lines if private not in line)


def signed(raw: bytes, chance: Random) -> bytes:
    """A shard whose index lies, with the right checksum: what no bit rot makes, but a person could."""
    body, count = bytearray(raw), 2 + chance.randrange(6)
    at = len(body) - 4 - 8 * chance.randrange(1, count)
    value = chance.choice(
        (0, 1, 2**31, 2**40, 2**62, 2**63, 2**64 - 1, 2**64 - 2, len(raw), len(raw) - 4)
    )
    body[at : at + 8] = value.to_bytes(8, "little")
    index = bytes(body[-4 - 8 * count : -4])
    body[-4:] = google_crc32c.value(index).to_bytes(4, "little")
    return bytes(body)
