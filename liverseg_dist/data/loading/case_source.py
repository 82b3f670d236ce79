"""`PatchSource`: reads sample n of a run from the store.

A sample whose augmentation rotates, scales or deforms it is read with the surrounding that is
needed (nnU-Net reads the largest surrounding for every sample). `DeviceTransform` computes the same
size from the same seed and crops the sample again. Used by `loader.PatchLoader`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from liverseg_dist.config import DataConfig, IntensityConfig, SlabConfig
from liverseg_dist.data.augment.presets import build_preset, draw_augmentation
from liverseg_dist.data.loading.array_reader import BoxReader, StoreReader, read_padded
from liverseg_dist.data.loading.node_cache import NodeCache, default_cache_dir
from liverseg_dist.data.loading.sampling import Centre, ForegroundIndex, SampleOrder, patch_start
from liverseg_dist.data.loading.shard_reader import ChunkError
from liverseg_dist.errors import RunFailed, UserError
from liverseg_dist.labels import IGNORE
from liverseg_dist.volume import Index3

log = logging.getLogger(__name__)
_MAX_REPLACEMENTS = 20
OPEN_CASES = 1024
"""Cases whose foreground voxels and shard indices stay in memory: about 200 KB each at 512x512."""
_SLICES = SlabConfig().slices


class StoredCase(Protocol):
    """The part of a case's metadata that is used here."""

    @property
    def labelled(self) -> bool: ...
    @property
    def valid_slices(self) -> Sequence[int]: ...
    @property
    def class_voxels(self) -> Sequence[int]: ...
    @property
    def annotated(self) -> Sequence[str]: ...
    @property
    def present(self) -> Sequence[bool]: ...
    @property
    def intensities(self) -> Sequence[IntensityConfig]: ...


class PatchStore(Protocol):
    """The part of `liverseg_dist.data.store.case_store.CaseStore` that is used here."""

    @property
    def path(self) -> str | Path: ...

    @property
    def content_sha256(self) -> str | None: ...

    def meta(self, case_id: str) -> StoredCase: ...

    def foreground(self, case_id: str) -> np.ndarray: ...


@dataclass(frozen=True)
class PatchPlan:
    """Position of a sample in its case."""

    index: int
    case_id: str
    centre: Centre | None
    patch_start: Index3
    start: Index3
    """First voxel of the box that is read: the patch with its surrounding."""
    shape: Index3
    """Size of this box (z, y, x)."""
    augment_seed: int


@dataclass(frozen=True, eq=False)
class Patch:
    """One sample as stored: voxels of all channels (int16) and label (uint8, IGNORE outside of the
    image)."""

    plan: PatchPlan
    image_CDHW: np.ndarray
    label_DHW: np.ndarray
    traits: "CaseTraits"

    @property
    def index(self) -> int:
        return self.plan.index

    @property
    def case_id(self) -> str:
        return self.plan.case_id


@dataclass(frozen=True)
class CaseTraits:
    """What every sample of a case shares beside its voxels."""

    intensities: tuple[IntensityConfig, ...]
    """Normalisation of each channel."""
    present: tuple[bool, ...]
    """Whether the case has each channel."""
    annotated: tuple[str, ...]
    """Names of the structures that were annotated."""


@dataclass(frozen=True, eq=False)
class _OpenCase:
    image: BoxReader
    label: BoxReader
    foreground: ForegroundIndex
    valid_slices: tuple[int, int]
    traits: CaseTraits


class PatchSource:
    """Samples of a run by their run-wide number. Safe to use from several threads.

    Memory: for each of the last `OPEN_CASES` cases 6 bytes per stored foreground voxel and the
    shard indices; per reading thread a decoded chunk of image and label and the compressed chunks
    of a patch.
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
                f"{store.path}: fold {settings.fold} has no training case; choose another data.fold"
            )
        self.settings = settings
        self.patch_size: Index3 = settings.patch_size
        self._store = store
        self._order = SampleOrder(case_ids, seed, global_batch_size, settings.oversample_foreground)
        self._preset = build_preset(settings)
        self._reader = StoreReader(store.path)
        # None for stores that were written without one: each case is then read from its own files.
        self._index = self._reader.open_index(store.content_sha256)
        # Without a cache (`cache_gib` 0) every read goes to the store.
        self._cache = _open_cache(store, self._reader, settings)
        # Two threads may open a case twice; both readers return the same voxels.
        self._case = lru_cache(OPEN_CASES)(self._open_case)
        self._reported: set[str] = set()

    def read_sample(self, index: int) -> Patch:
        """Read one sample.

        Raises:
            RunFailed: it cannot be read (see `data.on_read_error`).
        """
        return self.read_batch([index])[0]

    def plan_sample(self, index: int, attempt: int = 0) -> PatchPlan:
        """Find the position of a sample; reads the case's metadata when it is first used.

        Raises:
            ChunkError: the metadata cannot be read.
        """
        draw = self._order.draw_sample(index, attempt)
        augment_seed = self._order.augment_seed(index)
        case = self._case(draw.case_id)
        centre = case.foreground.draw_centre(draw.random) if draw.wants_foreground else None
        begin = patch_start(
            draw.random, centre, _shape_zyx(case.label), case.valid_slices, self.patch_size
        )
        shape = self.field_shape(augment_seed)
        margin = [(field - size) // 2 for field, size in zip(shape, self.patch_size, strict=True)]
        z, y, x = (b - m for b, m in zip(begin, margin, strict=True))
        return PatchPlan(index, draw.case_id, centre, begin, (z, y, x), shape, augment_seed)

    def field_shape(self, augment_seed: int) -> Index3:
        """Return the size (z, y, x) of the box that is read for a sample with this augmentation."""
        shape = draw_augmentation(self._preset, self.patch_size, augment_seed).field_shape
        if shape is None:
            return self.patch_size
        depth = self.patch_size[0]
        # A slab has no slices above and below.
        return depth if depth >= _SLICES else shape[0], shape[1], shape[2]

    def read_planned(self, plan: PatchPlan, image_CDHW: np.ndarray, label_DHW: np.ndarray) -> None:
        """Fill both arrays; arrays that are larger than the plan's box get padding around it.

        Raises:
            ChunkError: voxels cannot be read.
        """
        case = self._case(plan.case_id)
        centre_box = []
        for size, needed in zip(label_DHW.shape, plan.shape, strict=True):
            begin = (size - needed) // 2
            centre_box.append(slice(begin, begin + needed))
        box = tuple(centre_box)
        fills = [padding_value(intensity) for intensity in case.traits.intensities]
        if label_DHW.shape != plan.shape:
            for channel, fill in zip(image_CDHW, fills, strict=True):
                channel[...] = fill
            label_DHW[...] = IGNORE
        cached = (
            self._cache.get_readers(plan.case_id, case.image, case.label) if self._cache else None
        )
        image, label = cached or (case.image, case.label)
        for channel, fill in enumerate(fills):
            # A slice and not an index: the reader fills an array with an axis of channels.
            part = image_CDHW[channel : channel + 1][:, *box]
            read_padded(image, (channel, *plan.start), part, fill)
        read_padded(label, plan.start, label_DHW[box], IGNORE)

    def plan_readable_sample(self, index: int, attempt: int = 0) -> tuple[PatchPlan, int]:
        """Plan the sample, or its first replacement whose metadata can be read (policy skip)."""
        while True:
            try:
                return self.plan_sample(index, attempt), attempt
            except ChunkError as error:
                attempt = self.next_attempt(index, attempt, error)

    def next_attempt(self, index: int, attempt: int, error: ChunkError) -> int:
        """Return the number of the next attempt, with another case.

        Raises:
            RunFailed: the policy is `fail`, or too many cases are unreadable.
        """
        if self.settings.on_read_error == "fail":
            raise RunFailed(
                f"{self._store.path}: {error}; check the store with `liverseg verify`, convert the "
                "case again, or set data.on_read_error=skip to continue without it"
            ) from error
        if attempt + 1 >= _MAX_REPLACEMENTS:
            raise RunFailed(
                f"{self._store.path}: sample {index}: {attempt + 1} cases are unreadable, "
                f"the last: {error}; check the store with `liverseg verify`"
            )
        # Each damaged chunk is logged once, although it is requested in every pass over the data.
        if str(error) not in self._reported:
            self._reported.add(str(error))
            log.warning("sample %d is replaced by a sample of another case: %s", index, error)
        return attempt + 1

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return len(self.settings.image_channels)

    def get_traits(self, case_id: str) -> CaseTraits:
        """Return what every sample of a case shares beside its voxels."""
        return self._case(case_id).traits

    def read_batch(self, indices: Sequence[int]) -> list[Patch]:
        """Read samples into separate arrays (`PatchLoader` reads into shared ones)."""
        patches = []
        for index in indices:
            plan, attempt = self.plan_readable_sample(index)
            image = np.empty((self.channels, *plan.shape), np.int16)
            label = np.empty(plan.shape, np.uint8)
            plan = self.read_or_replace(plan, attempt, image, label)
            patches.append(Patch(plan, image, label, self.get_traits(plan.case_id)))
        return patches

    def read_or_replace(
        self, plan: PatchPlan, attempt: int, image_CDHW: np.ndarray, label_DHW: np.ndarray
    ) -> PatchPlan:
        """Read a sample; under the policy `skip` an unreadable sample is replaced.

        Returns:
            The plan of the sample that was read.
        """
        while True:
            try:
                self.read_planned(plan, image_CDHW, label_DHW)
                return plan
            except ChunkError as error:
                attempt = self.next_attempt(plan.index, attempt, error)
                plan, attempt = self.plan_readable_sample(plan.index, attempt)

    def close(self) -> None:
        """Close files and leave the node's cache. Later reads still work, but are slower."""
        self._case.cache_clear()
        self._reader.close()
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def _open_case(self, case_id: str) -> _OpenCase:
        meta = self._store.meta(case_id)
        # Checked here and not at the start, which would have to look at all cases.
        if not meta.labelled:
            raise UserError(
                f"{self._store.path}: case {case_id} has no label and cannot be used for training; "
                "convert the store again"
            )
        known = self._index.find_case(case_id) if self._index is not None else None
        foreground = known.foreground if known is not None else self._read_foreground(case_id)
        first, last = (int(z) for z in meta.valid_slices)
        image = self._reader.open_array(case_id, "image", known=known.image if known else None)
        label = self._reader.open_array(
            case_id,
            "label",
            may_be_empty=not any(meta.class_voxels[1:]),
            known=known.label if known else None,
        )
        traits = self._read_traits(meta)
        # Voxels outside of an array are padding: a wrong shape would silently become padding.
        expected = (len(traits.intensities), *label.shape)
        if image.shape != expected:
            raise ChunkError(f"cases/{case_id}/image: shape {image.shape}, not {expected}")
        return _OpenCase(image, label, foreground, (first, last), traits)

    def _read_foreground(self, case_id: str) -> ForegroundIndex:
        try:
            return ForegroundIndex(self._store.foreground(case_id))
        # zarr and file systems raise many types.
        except Exception as error:
            raise ChunkError(
                f"cases/{case_id}/foreground: {' '.join(str(error).split())}"
            ) from error

    def _read_traits(self, meta: StoredCase) -> CaseTraits:
        if self.channels != len(meta.intensities):
            raise UserError(
                f"{self._store.path}: its images have {len(meta.intensities)} channels, the run "
                f"reads {self.channels}"
            )
        intensities = select_intensities(self.settings, meta.intensities)
        return CaseTraits(intensities, tuple(meta.present), tuple(meta.annotated))


def select_intensities(
    settings: DataConfig, of_case: Sequence[IntensityConfig]
) -> tuple[IntensityConfig, ...]:
    """Return the normalisation of each channel of a case: the run's, where it has one.

    A store that was converted again may have other statistics, but the network was trained with
    those of the run.
    """
    selected = []
    for of_run, own in zip(settings.intensities, of_case, strict=True):
        selected.append(of_run or own)
    return tuple(selected)


def padding_value(intensity: IntensityConfig) -> int:
    """The stored value of padding: the lower clipping bound, which looks like air."""
    return int(intensity.lower_hu)


def _shape_zyx(label: BoxReader) -> Index3:
    z, y, x = label.shape
    return z, y, x


def _open_cache(store: PatchStore, reader: StoreReader, settings: DataConfig) -> NodeCache | None:
    if settings.cache_gib == 0:
        return None
    folder = settings.cache_dir or default_cache_dir()
    try:
        return NodeCache(
            folder, str(store.path), reader.read_fingerprint(), int(settings.cache_gib * 2**30)
        )
    except ChunkError as error:
        raise RunFailed(f"{store.path}: {error}") from error
    except OSError as error:
        where = error.filename or folder
        raise UserError(
            f"{where}: {error.strerror}; set data.cache_dir, or data.cache_gib=0"
        ) from None
