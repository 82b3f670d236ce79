"""Search for settings that fit a memory budget: recomputed levels, micro-batch, patch, strategy.

Used by `training` (activation checkpointing `auto`), `liverseg plan` and sweeps.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

import torch

from liverseg_dist.config import Settings
from liverseg_dist.distributed.collectives import all_max
from liverseg_dist.errors import UserError
from liverseg_dist.model.topology import resolve_topology
from liverseg_dist.planning.memory_estimate import (
    ALLOCATOR_OVERHEAD,
    GIB,
    MemoryEstimate,
    estimate_memory,
    micro_batch,
    trace_micro_batch,
)
from liverseg_dist.volume import Float3, Index3

MAX_FIELD_MM = 260.0
"""In-plane width that contains a liver: a larger patch mostly adds background."""
CANDIDATE_EDGES = (64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)


@dataclass(frozen=True)
class FitResult:
    """Result of `check_fit`."""

    fits: bool
    estimate: MemoryEstimate
    """With the best choice of recomputed levels."""
    reason: str
    """One line for the user."""


def check_fit(
    settings: Settings, spacing_mm: Float3, budget_gib: float, ranks: int = 1, device: str = "cuda"
) -> FitResult:
    """Check whether a training stays within a memory budget.

    Sweeps call it before a trial starts. It needs no GPU, no store and no files. Activation
    checkpointing is as the settings say (`auto`: as few levels as possible).

    Args:
        settings: settings of the run.
        spacing_mm: voxel size (z, y, x).
        budget_gib: memory per rank.
        ranks: number of ranks.
        device: cpu or cuda; the device need not exist.

    Raises:
        UserError: the settings are impossible for another reason.
    """
    settings = resolve_model(settings, spacing_mm)
    best = resolve_checkpointing(settings, budget_gib, ranks, device)
    fits = best.gib <= budget_gib
    batch, patch = micro_batch(settings.train, ranks), "x".join(map(str, settings.data.patch_size))
    sign = "<=" if fits else ">"
    reason = (
        f"batch {batch} of {patch} needs {best.gib:.2f} GiB {sign} {budget_gib:g} GiB "
        f"({best.describe_parts()})"
    )
    return FitResult(fits, best, reason)


def resolve_model(settings: Settings, spacing_mm: Float3) -> Settings:
    """Return the settings with the network's topology filled in."""
    return settings.model_copy(
        update={"model": resolve_topology(settings.model, settings.data.patch_size, spacing_mm)}
    )


def resolve_checkpointing(
    settings: Settings, budget_gib: float, ranks: int, device: str
) -> MemoryEstimate:
    """Return the estimate with activation checkpointing as configured.

    For `auto` it is the first choice of levels that fits, or the smallest estimate.
    """
    if settings.train.activation_checkpointing != "auto":
        return estimate_memory(settings, ranks, device, configured_levels(settings))
    # Without recomputation first: it is the fastest form.
    smallest = estimate_memory(settings, ranks, device, ())
    # From little extra work to much; the first that fits is the fastest that fits.
    for levels in candidate_levels(settings, budget_gib, ranks, device):
        if smallest.gib <= budget_gib:
            break
        other = estimate_memory(settings, ranks, device, levels)
        smallest = other if other.gib < smallest.gib else smallest
    return smallest


def configured_levels(settings: Settings) -> tuple[int, ...]:
    """Return the levels that `none`, `all` or a list of numbers name.

    Raises:
        UserError: a level does not exist.
    """
    wanted, depth = settings.train.activation_checkpointing, len(settings.model.features or ())
    if isinstance(wanted, str):
        return tuple(range(depth)) if wanted == "all" else ()
    if unknown := [level for level in wanted if not 0 <= level < depth]:
        raise UserError(
            f"train.activation_checkpointing: level {unknown[0]} does not exist; "
            f"this network has levels 0 to {depth - 1}"
        )
    return wanted


def candidate_levels(
    settings: Settings, budget_gib: float, ranks: int, device: str
) -> Iterator[tuple[int, ...]]:
    """Yield ranges of levels to recompute, the least extra work first.

    Ranges that store too much to fit are left out.
    """
    depth = len(settings.model.features or ())
    none = estimate_memory(settings, ranks, device, ())
    kept = trace_micro_batch(settings, ranks, device, ()).kept
    least = trace_micro_batch(settings, ranks, device, tuple(range(depth))).kept
    saved = [kept.get(level, 0) - least.get(level, 0) for level in range(depth)]
    work = [_forward_cost(settings, level) for level in range(depth)]
    fixed = sum(none.parts.values()) - none.parts["activations"]
    options = []
    # Contiguous ranges only: the levels that store most are neighbours, and all subsets would be
    # too many.
    for first, end in combinations(range(depth + 1), 2):
        options.append((sum(work[first:end]), tuple(range(first, end))))
    for _, levels in sorted(options):
        # Everything that is stored is alive at the end of forward: a lower bound of the peak.
        bound = fixed + sum(kept.values()) - sum(saved[levels[0] : levels[-1] + 1])
        if bound <= budget_gib * GIB or len(levels) == depth:
            yield levels


def _forward_cost(settings: Settings, level: int) -> float:
    """Return the relative cost of a level's forward: voxels * squared width * kernel * blocks."""
    # Relative to one voxel of the full resolution.
    model, voxels = settings.model, 1.0
    assert model.features
    assert model.strides
    assert model.kernels
    for stride in model.strides[: level + 1]:
        for step in stride:
            voxels /= step
    z, y, x = model.kernels[level]
    blocks = model.blocks_per_level[level] if isinstance(model.blocks_per_level, tuple) else 2
    return voxels * model.features[level] ** 2 * z * y * x * blocks


def memory_budget(settings: Settings, device: torch.device) -> float:
    """Return the GiB per rank for `auto`. A collective call.

    It is `memory.budget_gib`, or the memory of the smallest GPU of all ranks.

    Raises:
        UserError: on a CPU without `memory.budget_gib`.
    """
    if settings.memory.budget_gib is not None:
        return settings.memory.budget_gib
    if device.type != "cuda":
        raise UserError(
            "train.activation_checkpointing=auto on a CPU needs memory.budget_gib, the GiB that a "
            "rank may use; or name the levels, for example train.activation_checkpointing=[0]"
        )
    # The minimum over ranks by a maximum of negative numbers.
    return -all_max(-torch.cuda.get_device_properties(device).total_memory) / GIB


def choose_checkpointed_levels(
    settings: Settings, ranks: int, device: torch.device
) -> tuple[int, ...]:
    """Return the levels that a run recomputes. A collective call.

    Args:
        settings: settings with the network's topology filled in.
        ranks: number of ranks.
        device: this rank's device.

    Raises:
        UserError: no choice of levels fits the budget.
    """
    if settings.train.activation_checkpointing != "auto":
        return configured_levels(settings)
    budget = memory_budget(settings, device)
    best = resolve_checkpointing(settings, budget, ranks, device.type)
    if best.gib > budget:
        raise UserError(
            f"memory.budget_gib = {budget:g}: at least {best.gib:.2f} GiB are needed "
            f"({best.describe_parts()}), with levels {list(best.levels)} recomputed; "
            "lower train.micro_batch_size or data.patch_size (see liverseg plan)"
        )
    return best.levels


# --- plans --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PatchOption:
    """One patch size and what fits with it."""

    patch_size: Index3
    one_sample: MemoryEstimate
    """Without recomputation."""
    micro_batch: int
    """Most samples at once, up to the rank's share of the batch; 0: one sample does not fit."""
    estimate: MemoryEstimate
    """With this micro-batch and the recomputed levels it needs; the least if nothing fits."""


def candidate_patches(largest: Index3) -> list[Index3]:
    """Return patches to consider for cases up to this size, smallest first.

    They have the slab's depth and are square in plane.
    """
    # Multiples of 16, so that an edge can be halved four times.
    z, y, x = (edge // 16 * 16 or edge for edge in largest)
    patches = {(min(64, z), min(edge, y), min(edge, x)) for edge in (*CANDIDATE_EDGES, max(y, x))}
    return sorted(patches, key=lambda patch: patch[1] * patch[2])


def plan_patch(
    settings: Settings, patch: Index3, spacing_mm: Float3, budget_gib: float, ranks: int
) -> PatchOption:
    """Find what fits with this patch.

    Raises:
        UserError: the network cannot process the patch.
    """
    settings = resolve_model(
        replace_settings(settings, patch=patch, micro=1, levels=()), spacing_mm
    )
    one = estimate_memory(settings, ranks)
    # Several samples at once only if they need no recomputation, which costs more time than it
    # saves.
    if one.gib <= budget_gib:
        bytes_per_sample = one.parts["activations"] * (1 + ALLOCATOR_OVERHEAD)
        more_samples = int((budget_gib - one.gib) * GIB / bytes_per_sample)
        most = min(1 + more_samples, -(-settings.train.global_batch_size // ranks))
        # From the largest on: the estimate is not exactly linear in the number of samples.
        for size in range(most, 1, -1):
            several = estimate_memory(replace_settings(settings, micro=size), ranks)
            if several.gib <= budget_gib:
                return PatchOption(patch, one, size, several)
        return PatchOption(patch, one, 1, one)
    depth = len(settings.model.features or ())
    estimates = [estimate_memory(settings, ranks, levels=range(top)) for top in (1, 2, depth)]
    least = min(estimates, key=lambda estimate: estimate.gib)
    return PatchOption(patch, one, int(least.gib <= budget_gib), least)


def best_option(
    options: Iterable[PatchOption], spacing_mm: Float3, budget_gib: float
) -> PatchOption | None:
    """Return the largest patch up to `MAX_FIELD_MM` that needs no recomputation.

    If there is none, it is the largest patch that fits at all; None: no patch fits.
    """
    fitting = [option for option in options if option.micro_batch]
    useful = []
    for option in fitting:
        _, height, width = option.patch_size
        if max(height * spacing_mm[1], width * spacing_mm[2]) <= MAX_FIELD_MM:
            # A width beyond a liver is used only if nothing smaller exists.
            useful.append(option)
    plain = [o for o in useful or fitting[:1] if o.one_sample.gib <= budget_gib]
    best = plain or useful or fitting
    return best[-1] if best else None


def estimate_strategies(settings: Settings, ranks: int) -> dict[str, MemoryEstimate]:
    """Return the estimate for each strategy, for the same step."""
    estimates = {}
    for name, stage in (("ddp", 1), ("fsdp", 1), *(("deepspeed", stage) for stage in range(4))):
        update = {
            "strategy": name,
            "zero_stage": stage,
            "offload_optimizer": False,
            "deterministic_reduction": False,
        }
        train = settings.train.model_copy(update=update)
        levels = settings.train.activation_checkpointing
        assert not isinstance(levels, str)
        label = f"deepspeed zero_stage={stage}" if name == "deepspeed" else name
        estimates[label] = estimate_memory(
            settings.model_copy(update={"train": train}), ranks, levels=levels
        )
    return estimates


def replace_settings(
    settings: Settings,
    patch: Index3 | None = None,
    micro: int | None = None,
    levels: tuple[int, ...] | None = None,
) -> Settings:
    """Return the settings with these keys changed; None: unchanged."""
    update: dict[str, object] = {}
    if micro is not None:
        update["micro_batch_size"] = micro
    if levels is not None:
        update["activation_checkpointing"] = levels
    train = settings.train.model_copy(update=update)
    data = settings.data
    if patch is not None:
        data = data.model_copy(update={"patch_size": patch})
    return settings.model_copy(update={"train": train, "data": data})
