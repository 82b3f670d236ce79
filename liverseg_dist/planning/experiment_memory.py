"""The largest patch and micro-batch of a plan that fit into the memory of a device."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from liverseg_dist.config import Settings
from liverseg_dist.errors import UserError
from liverseg_dist.model.topology import PRESETS
from liverseg_dist.planning.experiment_rules import smaller_patches, stored_shape, wanted_patch
from liverseg_dist.planning.fingerprint import DatasetFingerprint
from liverseg_dist.planning.memory_estimate import MemoryEstimate, estimate_memory
from liverseg_dist.planning.memory_fit import (
    replace_settings,
    resolve_checkpointing,
    resolve_model,
)
from liverseg_dist.volume import Float3, Index3

MIN_BATCH = 2
"""nnU-Net: at least two samples per step."""
WORTH_IT = 1.25
"""A patch must gain this many voxels to justify accumulation or recomputation."""


@dataclass(frozen=True)
class GpuBudget:
    """Devices to plan for."""

    memory_gib: float
    devices: int = 1
    precision: str = "bf16"


@dataclass(frozen=True)
class PatchChoice:
    """A patch with the micro-batch and recomputed levels that it needs."""

    patch: Index3
    micro_batch: int
    estimate: MemoryEstimate


def choose_patch(
    base: Settings, fingerprint: DatasetFingerprint, spacing_mm: Float3, budget: GpuBudget
) -> PatchChoice:
    """Choose the largest useful patch that fits.

    Two samples at once without recomputation come first, as in nnU-Net. One sample at a time, then
    recomputed levels, are used only where the patch becomes considerably larger: instance
    normalisation gives the same gradients for two samples one after the other.

    Raises:
        UserError: No patch fits.
    """
    levels = PRESETS[base.model.preset].max_levels
    if "patch_size" in base.data.model_fields_set:
        patches = [base.data.patch_size]
    else:
        wanted, _ = wanted_patch(fingerprint, spacing_mm, levels)
        median = stored_shape(fingerprint, spacing_mm)
        # Rounded up: a batch of 2 on 3 devices still has one sample on each.
        patches = smaller_patches(wanted, median, spacing_mm, levels)
    together = -(-MIN_BATCH // budget.devices)
    # The number of the best patch so far, and how it is computed.
    best: tuple[int, int, bool] | None = None
    # In the order of preference: together, one by one, one by one with recomputation.
    for micro, recompute in ((together, False), (1, False), (1, True)):
        number = _find_fitting(base, patches, spacing_mm, budget, micro, recompute)
        if number is None:
            continue
        if best is None or _voxels(patches[number]) >= WORTH_IT * _voxels(patches[best[0]]):
            best = number, micro, recompute
        # The wanted patch fits; a slower way to compute it would gain nothing.
        if best[0] == 0:
            break
    if best is None:
        # The smallest patch with everything recomputed is the least that a training can need.
        least = _estimate(base, patches[-1], spacing_mm, budget, 1, recompute=True)
        voxels = "x".join(map(str, patches[-1]))
        raise UserError(
            f"--gpu-memory-gib {budget.memory_gib:g}: one sample of {voxels} needs "
            f"{least.gib:.2f} GiB ({least.describe_parts()}); use a smaller model.preset, or "
            "--cpu-minutes for a plan without a GPU"
        )
    number, micro, recompute = best
    return _describe_choice(base, patches[number], spacing_mm, budget, micro, recompute)


def _voxels(patch: Index3) -> int:
    return math.prod(patch)


def _find_fitting(
    base: Settings,
    patches: Sequence[Index3],
    spacing_mm: Float3,
    budget: GpuBudget,
    micro: int,
    recompute: bool,
) -> int | None:
    """Return the number of the first patch, in descending size, that fits; None if none does."""

    def fits(number: int) -> bool:
        found = _estimate(base, patches[number], spacing_mm, budget, micro, recompute)
        return found.gib <= budget.memory_gib

    return _first_true(len(patches), fits)


def _describe_choice(
    base: Settings,
    patch: Index3,
    spacing_mm: Float3,
    budget: GpuBudget,
    micro: int,
    recompute: bool,
) -> PatchChoice:
    """Return the patch with the levels that it recomputes: as few as the memory allows."""
    if not recompute:
        estimate = _estimate(base, patch, spacing_mm, budget, micro, recompute)
        return PatchChoice(patch, micro, estimate)
    settings = resolve_model(replace_settings(base, patch, micro, ()), spacing_mm)
    # From the finest level on, which stores most: a few estimates instead of one for each range.
    for count in range(1, len(settings.model.features or ()) + 1):
        estimate = estimate_memory(settings, budget.devices, levels=range(count))
        if estimate.gib <= budget.memory_gib:
            break
    return PatchChoice(patch, micro, estimate)


def _first_true(count: int, test: Callable[[int], bool]) -> int | None:
    """Return the first number below `count` that passes a test which is False, then True.

    By bisection, because each estimate runs the training step on tensors without memory.
    """
    # The first patch fits in most plans, and one estimate answers it.
    if test(0):
        return 0
    low, high = 0, count - 1
    if high == 0 or not test(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if test(middle) else (middle, high)
    return high


def _estimate(
    base: Settings,
    patch: Index3,
    spacing_mm: Float3,
    budget: GpuBudget,
    micro: int,
    recompute: bool,
) -> MemoryEstimate:
    settings = resolve_model(replace_settings(base, patch, micro, ()), spacing_mm)
    levels = range(len(settings.model.features or ())) if recompute else ()
    return estimate_memory(settings, budget.devices, levels=levels)


def largest_micro_batch(settings: Settings, budget: GpuBudget, most: int) -> int:
    """Return the largest micro-batch up to `most` that fits without recomputation."""

    def fits(micro: int) -> bool:
        train = settings.train.model_copy(
            update={"micro_batch_size": micro, "global_batch_size": micro * budget.devices}
        )
        wanted = settings.model_copy(update={"train": train})
        return estimate_memory(wanted, budget.devices).gib <= budget.memory_gib

    low, high = 1, most
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def estimate_plan(settings: Settings, budget: GpuBudget) -> MemoryEstimate:
    """Return the memory of a rank with the settings of a plan."""
    return resolve_checkpointing(settings, budget.memory_gib, budget.devices, "cuda")
