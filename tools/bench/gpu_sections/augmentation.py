"""Augmentation on the device: time of a sample, waits for the device, and what it adds to a step."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from step_timing import time_calls
from torch.utils._python_dispatch import TorchDispatchMode

from liverseg_dist.data.augment import PRESETS, DeviceTransform, build_preset
from liverseg_dist.data.loading.loader import Batch

from .context import Context, Figures
from .data import load_preset, open_loader, phantom_store

BATCHES = 40
PEER_PACKAGES = ("batchgenerators", "batchgeneratorsv2")


class ScalarReads(TorchDispatchMode):
    """Counts reads of single values, each of which waits for a GPU."""

    count = 0

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


def run(context: Context) -> None:
    for name in PRESETS:
        context.measure(
            "augmentation of a sample", f"liverseg, {name}", lambda n=name: measure(context, n)
        )
    context.measure(
        "augmentation of a sample",
        "batchgeneratorsv2 on one core",
        lambda: measure_peer(context),
        packages=PEER_PACKAGES,
        needs_s=12,
    )


def measure(context: Context, name: str) -> Figures:
    """Milliseconds of a sample with the voxels on the device, copies, and waits."""
    settings = load_preset(context, "M", [f"data.augmentation={name}"])
    store, count = phantom_store(context), context.choose(BATCHES, 2)
    transform = DeviceTransform(build_preset(settings.data), settings.data.patch_size)
    with open_loader(settings, store, count) as loader:
        batches = list(loader)
    on_device = [batch.to(context.device, non_blocking=False) for batch in batches]
    samples = len(batches[0].indices)
    for batch in on_device[: context.choose(5, 1)]:
        transform(batch)
    pending = iter(on_device)
    timing = time_calls(lambda: transform(next(pending)), count, context.device)
    mean_s = sum(timing.seconds) / count
    found: Figures = {
        "mean_ms": mean_s / samples * 1e3,
        "median_ms": timing.median_s / samples * 1e3,
        "most_ms": max(timing.seconds) / samples * 1e3,
    }
    return {**found, **count_waits(context, transform, batches, count * samples)}


def count_waits(
    context: Context, transform: DeviceTransform, batches: list[Batch], samples: int
) -> Figures:
    """Reads of single values, and on a GPU all synchronisations, per sample; copies included."""
    with ScalarReads() as reads, synchronisations(context) as messages:
        for batch in batches:
            transform(batch.to(context.device))
    found: Figures = {"scalar_reads_per_sample": reads.count / samples}
    if context.device.type == "cuda":
        found["synchronisations_per_sample"] = len(messages) / samples
    return found


@contextmanager
def synchronisations(context: Context) -> Iterator[list[warnings.WarningMessage]]:
    """Collect torch's warning of each synchronising operation."""
    if context.device.type != "cuda":
        yield []
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            messages: list[warnings.WarningMessage] = []
            yield messages
            messages += [item for item in caught if "synchroniz" in str(item.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def measure_peer(context: Context) -> Figures:
    """nnU-Net's transforms, which run on the CPU, in each of its worker processes."""
    from loader_peers import time_nnunet_transforms

    torch.set_num_threads(1)
    settings, store = load_preset(context, "M"), phantom_store(context)
    case_id = store.ids("train", settings.data.fold)[0]
    case = np.asarray(store.image(case_id)[0]), np.asarray(store.label(case_id))
    mean_ms = time_nnunet_transforms(
        [case], settings.data.patch_size, context.choose(10, 1), warm_up=context.choose(30, 1)
    )
    return {"mean_ms": mean_ms}
