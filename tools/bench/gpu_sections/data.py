"""Data for the sections: phantoms, a store of them, settings of the shipped configurations.

Phantoms of the small size are quick to make. Converted at the voxel size of a shipped configuration
they give slabs of the size of real ones (64 x 437 x 437 and larger).
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from liverseg_dist.commands.main import main as liverseg
from liverseg_dist.config import Settings, load_settings
from liverseg_dist.data.augment import DeviceTransform, build_preset
from liverseg_dist.data.loading import DeviceBatch, DevicePrefetcher, PatchLoader, PatchSource
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.distributed.world import World
from liverseg_dist.training.components import resolve_settings

from .context import ROOT, Context, NotMeasured

CONFIGS = {
    "M": ROOT / "configs" / "task03_M.yaml",
    "S": ROOT / "configs" / "task03_S.yaml",
    "ResEnc-L": ROOT / "configs" / "task03_L.yaml",
}
"""Configuration of each network that is measured."""
SMALL_PATCH = "[16,32,32]"
SMALL_SETTINGS = (
    f"data.patch_size={SMALL_PATCH}",
    "model.preset=tiny",
    "model.features=[4,8,16]",
    "train.threads=1",
    "train.precision=fp32",
    "inference.precision=fp32",
    "inference.mirror=false",
)
"""Replace the sizes of a configuration in the CPU mode."""


def run_command(*words: object) -> None:
    """Run a command of `liverseg` in this process.

    Raises:
        RuntimeError: it failed; its message is on stderr.
    """
    code = liverseg([*map(str, words), "--quiet"])
    if code:
        raise RuntimeError(f"liverseg {words[0]} ended with exit code {code}")


@contextmanager
def prepared_once(path: Path) -> Iterator[bool]:
    """Yield whether `path` has to be made, and mark it as complete when the block ends."""
    done = path.with_name(f"{path.name}.done")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        is_missing = not done.exists()
        yield is_missing
        if is_missing:
            done.touch()


def phantom_source(context: Context) -> Path:
    """Return a data set of small phantoms in the layout of Task03."""
    path = context.work / "Task03_Phantom"
    with prepared_once(path) as is_missing:
        if is_missing:
            count, workers = context.choose((8, 8), (4, 1))
            run_command("phantom", path, "--cases", count, "--seed", 3, "--workers", workers)
    return path


def phantom_store(context: Context) -> CaseStore:
    """Return a store of the phantoms, at the voxel size of the M configuration."""
    source, path = phantom_source(context), context.work / "store.zarr"
    with prepared_once(path) as is_missing:
        if is_missing:
            spacing = context.choose("[2.5,0.8,0.8]", "[6,6,6]")
            run_command(
                "convert", source, path, f"convert.cleaning.spacing_mm={spacing}",
                "convert.splits.folds=2", f"convert.workers={context.choose(8, 1)}",
            )  # fmt: skip
    return CaseStore.open(path)


def load_preset(context: Context, preset: str, overrides: Sequence[str] = ()) -> Settings:
    """Return the settings of a shipped configuration, on the store of phantoms, resolved.

    One step is one micro-batch. The data set of a configuration does not matter here, so its
    conversion settings are those of the store.
    """
    store = phantom_store(context)
    settings = load_settings([CONFIGS[preset]], common_overrides(context))
    micro = settings.train.micro_batch_size
    more = [f"train.global_batch_size={micro}", *overrides]
    settings = load_settings([CONFIGS[preset]], [*common_overrides(context), *more])
    return resolve_settings(settings, store)


def common_overrides(context: Context) -> list[str]:
    """Settings that make a shipped configuration run on the store of phantoms."""
    found = [f"data.store={context.work / 'store.zarr'}", "data.fold=all"]
    return [*found, *(SMALL_SETTINGS if context.is_small else ())]


def single_world(context: Context) -> World:
    """This process alone, on the device of the benchmark."""
    if context.device.type == "cuda":
        torch.cuda.set_device(context.device)
    return World(device=context.device)


@contextmanager
def open_loader(
    settings: Settings, store: CaseStore, batches: int, workers: int = 0, pin: bool = False
) -> Iterator[PatchLoader]:
    """Open a loader of `batches` micro-batches of the training cases."""
    train = settings.train
    ids = store.ids("train", settings.data.fold)
    source = PatchSource(store, ids, settings.data, settings.seed, train.global_batch_size)
    size = train.micro_batch_size
    numbers = [list(range(first * size, (first + 1) * size)) for first in range(batches)]
    with PatchLoader(source, numbers, workers, settings.data.prefetch, pin) as loader:
        yield loader


def load_one_batch(context: Context, settings: Settings, store: CaseStore) -> DeviceBatch:
    """Return one augmented micro-batch on the device."""
    transform = DeviceTransform(build_preset(settings.data), settings.data.patch_size)
    with open_loader(settings, store, 1) as loader:
        return next(DevicePrefetcher(loader, transform, context.device))


class RepeatedBatch:
    """Gives the same batch in every step: what `Stepper` reads of a `DevicePrefetcher`."""

    wait_s = 0.0

    def __init__(self, batch: DeviceBatch) -> None:
        self._batch = batch

    def __next__(self) -> DeviceBatch:
        return self._batch

    def begin_next(self) -> None:
        """Nothing to copy."""


def usable_workers(context: Context, workers: int) -> None:
    """Raise `NotMeasured` for more loader threads than the machine has cores."""
    cores = len(os.sched_getaffinity(0))
    if not context.is_small and workers > cores:
        raise NotMeasured(f"{workers} threads, but {cores} cores")
