"""`PatchSource`: sample n of a run, read from the store.

A sample whose augmentation turns, scales or bends it is read with as much surrounding as that needs (nnU-Net reads the
largest surrounding every time); `DeviceTransform` knows the same number from the same seed and cuts it back.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from liverseg_dist.config import DataConfig, IntensityConfig, SlabConfig
from liverseg_dist.data.augment.presets import augmentation_preset, draw_augmentation
from liverseg_dist.data.loading.array_reader import BoxReader, StoreReader, read_padded
from liverseg_dist.data.loading.node_cache import NodeCache, default_folder
from liverseg_dist.data.loading.sampling import Centre, ForegroundIndex, SampleOrder, patch_start
from liverseg_dist.data.loading.shard_reader import ChunkError
from liverseg_dist.errors import RunFailed, UserError
from liverseg_dist.labels import IGNORE
from liverseg_dist.volume import Index3

log = logging.getLogger(__name__)
_MAX_REPLACEMENTS = 20
OPEN_CASES = 1024
"""Cases whose foreground voxels and shard indices are kept: some 200 KB each at 512x512."""
_SLICES = SlabConfig().slices


class StoredCase(Protocol):
    """What is asked of a case's metadata."""

    @property
    def labelled(self) -> bool: ...
    @property
    def valid_slices(self) -> Sequence[int]: ...
    @property
    def class_voxels(self) -> Sequence[int]: ...
    @property
    def intensity(self) -> IntensityConfig: ...


class PatchStore(Protocol):
    """What is asked of the store (`liverseg_dist.data.store.case_store.CaseStore`)."""

    @property
    def path(self) -> str | Path: ...

    def meta(self, case_id: str) -> StoredCase: ...

    def foreground(self, case_id: str) -> np.ndarray: ...


@dataclass(frozen=True)
class PatchPlan:
    """Where sample `index` lies. `start` and `shape` are the box to read: the patch and the surrounding it needs."""

    index: int
    case_id: str
    centre: Centre | None
    patch_start: Index3
    start: Index3
    shape: Index3
    augment_seed: int


@dataclass(frozen=True, eq=False)
class Patch:
    """One sample as stored: HU (int16), label (uint8, IGNORE where there is no image)."""

    plan: PatchPlan
    image_DHW: np.ndarray
    label_DHW: np.ndarray
    intensity: IntensityConfig

    @property
    def index(self) -> int:
        return self.plan.index

    @property
    def case_id(self) -> str:
        return self.plan.case_id


@dataclass(frozen=True, eq=False)
class _OpenCase:
    image: BoxReader
    label: BoxReader
    foreground: ForegroundIndex
    valid_slices: tuple[int, int]
    intensity: IntensityConfig


class PatchSource:
    """Samples of a run by their run-wide number. Safe to use from several threads.

    Memory: for each of the `OPEN_CASES` cases used last 6 bytes a stored foreground voxel and its shard indices; per
    reading thread a decoded chunk of image and label and the compressed chunks of one patch.
    """

    def __init__(
        self,
        store: PatchStore,
        case_ids: Sequence[str],
        settings: DataConfig,
        seed: int,
        global_batch_size: int,
    ) -> None:
        if not case_ids:
            raise UserError(
                f"{store.path}: no case to train on in fold {settings.fold}; choose another data.fold"
            )
        self.settings = settings
        self.patch_size: Index3 = settings.patch_size
        self._store = store
        self._order = SampleOrder(case_ids, seed, global_batch_size, settings.oversample_foreground)
        self._preset = augmentation_preset(settings)
        self._reader = StoreReader(store.path)
        self._cache = _open_cache(store, self._reader, settings)
        self._case = lru_cache(OPEN_CASES)(
            self._open_case
        )  # two threads may open one twice, and read the same
        self._reported: set[str] = set()

    def sample(self, index: int) -> Patch:
        """Sample `index`. Raises `RunFailed` when it cannot be read (see `data.on_read_error`)."""
        return self.read_batch([index])[0]

    def plan(self, index: int, attempt: int = 0) -> PatchPlan:
        """Where sample `index` lies; reads the case's metadata the first time. Raises `ChunkError`."""
        draw = self._order.draw(index, attempt)
        augment_seed = self._order.augment_seed(index)
        case = self._case(draw.case_id)
        centre = case.foreground.draw(draw.random) if draw.wants_foreground else None
        begin = patch_start(
            draw.random, centre, case.image.shape, case.valid_slices, self.patch_size
        )
        shape = self.field_shape(augment_seed)
        margin = [(field - size) // 2 for field, size in zip(shape, self.patch_size, strict=True)]
        z, y, x = (b - m for b, m in zip(begin, margin, strict=True))
        return PatchPlan(index, draw.case_id, centre, begin, (z, y, x), shape, augment_seed)

    def field_shape(self, augment_seed: int) -> Index3:
        """Size (z, y, x) of the box that is read for a sample with this augmentation."""
        shape = draw_augmentation(self._preset, self.patch_size, augment_seed).field_shape
        if shape is None:
            return self.patch_size
        depth = self.patch_size[0]
        return (
            depth if depth >= _SLICES else shape[0],
            shape[1],
            shape[2],
        )  # above and below a slab there is nothing

    def read(self, plan: PatchPlan, image_DHW: np.ndarray, label_DHW: np.ndarray) -> None:
        """Fill both arrays; where they are larger than the plan's box they get padding. Raises `ChunkError`."""
        case = self._case(plan.case_id)
        fill_hu = int(case.intensity.lower_hu)
        box = tuple(
            slice((have - want) // 2, (have - want) // 2 + want)
            for have, want in zip(image_DHW.shape, plan.shape, strict=True)
        )
        if image_DHW.shape != plan.shape:
            image_DHW[...] = fill_hu
            label_DHW[...] = IGNORE
        cached = self._cache.get(plan.case_id, case.image, case.label) if self._cache else None
        image, label = cached or (case.image, case.label)
        read_padded(image, plan.start, image_DHW[box], fill_hu)
        read_padded(label, plan.start, label_DHW[box], IGNORE)

    def readable_plan(self, index: int, attempt: int = 0) -> tuple[PatchPlan, int]:
        """`plan`, or that of the first replacement whose metadata can be read (policy skip)."""
        while True:
            try:
                return self.plan(index, attempt), attempt
            except ChunkError as error:
                attempt = self.give_up_on(index, attempt, error)

    def give_up_on(self, index: int, attempt: int, error: ChunkError) -> int:
        """The next attempt at this sample, with another case; raises `RunFailed` under the policy `fail`."""
        if self.settings.on_read_error == "fail":
            raise RunFailed(
                f"{self._store.path}: {error}; `liverseg verify` checks the store, converting the case again mends it, "
                "data.on_read_error=skip goes on without it"
            ) from error
        if attempt + 1 >= _MAX_REPLACEMENTS:
            raise RunFailed(
                f"{self._store.path}: sample {index}: {attempt + 1} cases are unreadable, last {error}"
            )
        if str(error) not in self._reported:
            self._reported.add(str(error))
            log.warning("sample %d is replaced by one of another case: %s", index, error)
        return attempt + 1

    def intensity(self, case_id: str) -> IntensityConfig:
        return self._case(case_id).intensity

    def read_batch(self, indices: Sequence[int]) -> list[Patch]:
        """Samples as separate arrays (`PatchLoader` reads into shared ones)."""
        patches = []
        for index in indices:
            plan, attempt = self.readable_plan(index)
            image, label = np.empty(plan.shape, np.int16), np.empty(plan.shape, np.uint8)
            plan = self.read_or_replace(plan, attempt, image, label)
            patches.append(Patch(plan, image, label, self.intensity(plan.case_id)))
        return patches

    def read_or_replace(
        self, plan: PatchPlan, attempt: int, image_DHW: np.ndarray, label_DHW: np.ndarray
    ) -> PatchPlan:
        """`read`; under the policy `skip` an unreadable sample is replaced. Returns what was read."""
        while True:
            try:
                self.read(plan, image_DHW, label_DHW)
                return plan
            except ChunkError as error:
                attempt = self.give_up_on(plan.index, attempt, error)
                plan, attempt = self.readable_plan(plan.index, attempt)

    def close(self) -> None:
        """Close files and leave the node's cache. Reading goes on working, more slowly."""
        self._case.cache_clear()
        self._reader.close()
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def _open_case(self, case_id: str) -> _OpenCase:
        meta = self._store.meta(case_id)
        try:
            foreground = self._store.foreground(case_id)
        except Exception as error:  # zarr and file systems raise many kinds
            raise ChunkError(
                f"cases/{case_id}/foreground: {' '.join(str(error).split())}"
            ) from error
        if not meta.labelled:
            raise UserError(
                f"{self._store.path}: case {case_id} has no label and cannot be trained on"
            )
        first, last = (int(z) for z in meta.valid_slices)
        return _OpenCase(
            self._reader.array(case_id, "image"),
            self._reader.array(case_id, "label", may_be_empty=not any(meta.class_voxels[1:])),
            ForegroundIndex(foreground),
            (first, last),
            self.settings.intensity or meta.intensity,
        )


def _open_cache(store: PatchStore, reader: StoreReader, settings: DataConfig) -> NodeCache | None:
    if settings.cache_gib == 0:
        return None
    folder = settings.cache_dir or default_folder()
    try:
        return NodeCache(
            folder, str(store.path), reader.fingerprint(), int(settings.cache_gib * 2**30)
        )
    except ChunkError as error:
        raise RunFailed(f"{store.path}: {error}") from error
    except OSError as error:
        where = error.filename or folder
        raise UserError(
            f"{where}: {error.strerror}; set data.cache_dir, or data.cache_gib=0"
        ) from None
