"""The Python interface: a store's cases and training batches, and masks of arrays by a trained run.

  import liverseg_dist

  store = liverseg_dist.open_store("store.zarr")
  for case in liverseg_dist.iterate_cases(store, "train"):
      print(case.case_id, case.image_zyx.shape, case.label_zyx.max())
  batch = next(liverseg_dist.iterate_batches(store, batch_size=2, patch_size=(64, 128, 128)))
  model = liverseg_dist.load_model("runs/first")
  mask_zyx = liverseg_dist.predict(model, image_zyx, spacing_mm=(2.5, 0.8, 0.8))

The names are available from `liverseg_dist` itself, which imports torch only when one of them is
used.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from liverseg_dist.config import DataConfig
from liverseg_dist.data.augment import DeviceTransform, build_preset
from liverseg_dist.data.loading import (
    DeviceBatch,
    DevicePrefetcher,
    PatchLoader,
    PatchSource,
    fill_in_data_settings,
)
from liverseg_dist.data.store.case_store import CaseStore, Part
from liverseg_dist.errors import UserError
from liverseg_dist.inference.load_run import LoadedRun, build_predictor, load_run
from liverseg_dist.inference.segment_scan import segment_scan
from liverseg_dist.inference.sliding_window import SlidingWindowPredictor
from liverseg_dist.labels import LabelScheme
from liverseg_dist.volume import Float3, Grid, Index3, Volume

Augmentation = Literal["none", "light", "nnunet", "strong"]


@dataclass(frozen=True, eq=False)
class Case:
    """One stored case (a slab of a scan) as arrays."""

    case_id: str
    image_czyx: np.ndarray
    """int16, all channels (`store.channels`) as stored: HU for CT; 0 in an absent channel."""
    label_zyx: np.ndarray | None
    """uint8: class values of `store.labels` (Task03: 0 background, 1 liver, 2 tumour), 255 padding
    outside the scan; None where the case has no label."""
    spacing_mm: Float3
    """Voxel size (z, y, x)."""
    present: tuple[bool, ...]
    """Whether the case has each channel."""
    annotated: tuple[str, ...]
    """Names of the annotated structures; the others are unknown, not absent."""

    @property
    def image_zyx(self) -> np.ndarray:
        """The only channel. Raises `UserError` where the image has several."""
        if len(self.image_czyx) != 1:
            raise UserError(
                f"{self.case_id}: the image has {len(self.image_czyx)} channels; use image_czyx"
            )
        return np.asarray(self.image_czyx[0])


@dataclass(frozen=True, eq=False)
class Model:
    """A trained run with its sliding-window predictor."""

    run: LoadedRun
    predictor: SlidingWindowPredictor

    @property
    def labels(self) -> LabelScheme:
        """Class values and structures of the masks."""
        return self.predictor.outputs.labels


def open_store(path: str | Path) -> CaseStore:
    """Open a Zarr store, written by `liverseg convert`, for reading.

    Args:
        path: folder or fsspec URL.

    Raises:
        UserError: the path is not a finished store of a supported version.
    """
    return CaseStore.open(path)


def iterate_cases(
    store: CaseStore, part: Part = "train", fold: int | Literal["all"] = 0
) -> Iterator[Case]:
    """Iterate over the cases of a part of the store, sorted by id. Cases are read one by one.

    Args:
        part: train, validation or test.
        fold: the validation fold that train and validation refer to.
    """
    for case_id in store.ids(part, fold):
        meta = store.meta(case_id)
        label_zyx = store.label(case_id) if meta.labelled else None
        yield Case(
            case_id,
            store.image(case_id),
            label_zyx,
            meta.grid.spacing_mm,
            meta.present,
            meta.annotated,
        )


def iterate_batches(
    store: CaseStore,
    batch_size: int = 2,
    patch_size: Index3 = (64, 128, 128),
    fold: int | Literal["all"] = 0,
    augmentation: Augmentation = "nnunet",
    seed: int = 0,
    workers: int = 1,
    device: str | torch.device = "cpu",
) -> Iterator[DeviceBatch]:
    """Iterate endlessly over training batches, sampled and augmented as by `liverseg train`.

    Batch n depends only on the arguments and n. The iterator has reading threads: call `.close()`,
    or delete it, when it is no longer needed.

    Args:
        patch_size: (z, y, x) in voxels of the store.
        workers: reading threads; 0: read when the next batch is requested.

    Yields:
        `image_BCDHW`, float32 (batch, channels, z, y, x), normalised, 0 in absent channels;
        `label_BDHW`, uint8, 255 where there is no label; `case_ids`, `indices` and `annotated`
        structures of the samples.
    """
    data = DataConfig(patch_size=patch_size, fold=fold, augmentation=augmentation, workers=workers)
    data = fill_in_data_settings(data, store)
    source = PatchSource(store, store.ids("train", fold), data, seed, batch_size)
    # Accepts names such as "cuda:1".
    device = torch.device(device)
    transform = DeviceTransform(build_preset(data), patch_size)
    with PatchLoader(
        source,
        _count_samples(batch_size),
        workers,
        data.prefetch,
        device.type == "cuda",
        transform.list_tables,
    ) as loader:
        yield from DevicePrefetcher(loader, transform, device)


def _count_samples(batch_size: int) -> Iterator[list[int]]:
    first = 0
    while True:
        yield list(range(first, first + batch_size))
        first += batch_size


def load_model(
    run: str | Path,
    device: str | torch.device = "cpu",
    weights: Literal["last", "best"] = "last",
    threads: int = 1,
) -> Model:
    """Load the model of a run folder, with the run's preparation of scans and post-processing.

    Args:
        weights: of the end of training, or of the best validation.
        threads: windows computed in parallel on a CPU.

    Raises:
        UserError: the folder is not a trained run.
    """
    device = torch.device(device)
    loaded = load_run(run, device, weights=weights)
    return Model(loaded, build_predictor([loaded], device, threads))


def predict(
    model: Model,
    image: np.ndarray,
    spacing_mm: Float3 | None = None,
    affine: np.ndarray | None = None,
    present: Sequence[bool] | None = None,
) -> np.ndarray:
    """Segment a scan given as an array. The mask is that of `liverseg predict` for the file.

    Args:
        image: any number type, axes z, y, x; for runs of several channels (C, z, y, x) in the order
            of the run's channels, on one grid. HU for CT.
        spacing_mm: voxel size (z, y, x), for an array whose x axis points to the patient's right, y
            to the front and z upwards.
        affine: instead of `spacing_mm`, for any orientation: the 4x4 matrix of NIfTI from (x, y, z)
            to mm in RAS+.
        present: which channels the scan has; None: all.

    Returns:
        Class values uint8 (z, y, x); `model.labels` names them.

    Raises:
        UserError: the array has other axes, the run needs other channels, or not exactly one of
            `spacing_mm` and `affine` is given.
    """
    if image.ndim not in (3, 4):
        raise UserError(f"an image has three axes (z, y, x), not shape {image.shape}")
    if (spacing_mm is None) == (affine is None):
        raise UserError("give either spacing_mm (z, y, x) or affine")
    if affine is None:
        assert spacing_mm is not None
        # An affine has its axes in the order x, y, z.
        affine = np.diag([*reversed(spacing_mm), 1.0])
    channels = image[None] if image.ndim == 3 else image
    has_channel = [True] * len(channels) if present is None else list(present)
    if len(has_channel) != len(channels):
        raise UserError(f"present has {len(has_channel)} entries for {len(channels)} channels")
    z, y, x = image.shape[-3:]
    grid = Grid((z, y, x), affine)
    volumes = []
    for voxels_zyx, is_present in zip(channels, has_channel, strict=True):
        volumes.append(Volume(voxels_zyx, grid) if is_present else None)
    return segment_scan(volumes, model.predictor, model.run.settings)
