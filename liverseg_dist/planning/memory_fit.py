"""Settings that fit a memory budget: levels to recompute, micro-batch, patch, strategy."""

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

FIELD_MM = 260.0
"""In-plane width that holds a liver: a larger patch mostly adds background."""
EDGES = (64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)


@dataclass(frozen=True)
class FitResult:
    """An answer of `check_fit`: yes or no, the need of the best form, and one line of reason."""

    fits: bool
    need: MemoryEstimate
    reason: str


def check_fit(
    settings: Settings, spacing_mm: Float3, budget_gib: float, ranks: int = 1, device: str = "cuda"
) -> FitResult:
    """Whether a training with these settings stays within `budget_gib` per rank; for sweeps, before a trial starts.

    Pure: no GPU, no store, no files. Checkpointing as the settings say (`auto`: as few levels as it takes). Raises
    `UserError` for settings that are impossible anyway.
    """
    settings = resolve_model(settings, spacing_mm)
    best = resolve_checkpointing(settings, budget_gib, ranks, device)
    good = best.gib <= budget_gib
    batch, patch = micro_batch(settings.train, ranks), "x".join(map(str, settings.data.patch_size))
    sign = "<=" if good else ">"
    told = f"batch {batch} of {patch} needs {best.gib:.2f} GiB {sign} {budget_gib:g} GiB ({best.explain()})"
    return FitResult(good, best, told)


def resolve_model(settings: Settings, spacing_mm: Float3) -> Settings:
    """With the network's topology filled in."""
    return settings.model_copy(
        update={"model": resolve_topology(settings.model, settings.data.patch_size, spacing_mm)}
    )


def resolve_checkpointing(
    settings: Settings, budget_gib: float, ranks: int, device: str
) -> MemoryEstimate:
    """The need with checkpointing as configured; for `auto` the first choice of levels that fits, or the smallest."""
    if settings.train.activation_checkpointing != "auto":
        return estimate_memory(settings, ranks, device, configured_levels(settings))
    smallest = estimate_memory(settings, ranks, device, ())
    for levels in cheapest_first(settings, budget_gib, ranks, device):
        if smallest.gib <= budget_gib:
            break
        other = estimate_memory(settings, ranks, device, levels)
        smallest = other if other.gib < smallest.gib else smallest
    return smallest


def configured_levels(settings: Settings) -> tuple[int, ...]:
    """The levels that `none`, `all` or a list of numbers stand for. Raises `UserError` for one that is not there."""
    wanted, depth = settings.train.activation_checkpointing, len(settings.model.features or ())
    if isinstance(wanted, str):
        return tuple(range(depth)) if wanted == "all" else ()
    if unknown := [level for level in wanted if not 0 <= level < depth]:
        raise UserError(
            f"train.activation_checkpointing: no level {unknown[0]}; this network has 0 to {depth - 1}"
        )
    return wanted


def cheapest_first(
    settings: Settings, budget_gib: float, ranks: int, device: str
) -> Iterator[tuple[int, ...]]:
    """Runs of levels to recompute, the least extra work first, without those that keep too much to ever fit."""
    depth = len(settings.model.features or ())
    none = estimate_memory(settings, ranks, device, ())
    kept, least = (
        trace_micro_batch(settings, ranks, device, levels).kept
        for levels in ((), tuple(range(depth)))
    )
    saved = {level: kept.get(level, 0) - least.get(level, 0) for level in range(depth)}
    work = {level: _work(settings, level) for level in range(depth)}
    fixed = sum(none.parts.values()) - none.parts["activations"]
    options = [tuple(range(first, end)) for first, end in combinations(range(depth + 1), 2)]
    for levels in sorted(
        options, key=lambda levels: (sum(work[level] for level in levels), levels)
    ):
        # Everything kept is alive when forward ends, so this is a lower bound of the peak.
        bound = fixed + sum(kept.values()) - sum(saved[level] for level in levels)
        if bound <= budget_gib * GIB or len(levels) == depth:
            yield levels


def _work(settings: Settings, level: int) -> float:
    """Relative cost of a level's forward: voxels times squared width times kernel, encoder and decoder."""
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
    """GiB per rank for `auto`: `memory.budget_gib`, or all of the smallest rank's GPU. A collective call."""
    if settings.memory.budget_gib is not None:
        return settings.memory.budget_gib
    if device.type != "cuda":
        raise UserError(
            "train.activation_checkpointing=auto on a CPU needs memory.budget_gib, the GiB a rank may use; "
            "or name the levels, e.g. train.activation_checkpointing=[0]"
        )
    return -all_max(-torch.cuda.get_device_properties(device).total_memory) / GIB


def levels_for(settings: Settings, ranks: int, device: torch.device) -> tuple[int, ...]:
    """The levels a run recomputes, from `train.activation_checkpointing`. Raises `UserError` when `auto` cannot fit.

    `settings` with their topology filled in. A collective call.
    """
    if settings.train.activation_checkpointing != "auto":
        return configured_levels(settings)
    budget = memory_budget(settings, device)
    best = resolve_checkpointing(settings, budget, ranks, device.type)
    if best.gib > budget:
        raise UserError(
            f"memory.budget_gib = {budget:g}: at least {best.gib:.2f} GiB are needed ({best.explain()}), with levels "
            f"{list(best.levels)} recomputed; lower train.micro_batch_size or data.patch_size (see liverseg plan)"
        )
    return best.levels


# --- plans --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PatchOption:
    """One patch and what fits with it."""

    patch_size: Index3
    one: MemoryEstimate
    """One sample, nothing recomputed."""
    micro_batch: int
    """Most samples at once, up to the rank's share of the batch; 0: not even one fits."""
    need: MemoryEstimate
    """With that micro-batch and the levels it takes; the least found when nothing fits."""


def candidate_patches(largest: Index3) -> list[Index3]:
    """Patches to consider for cases of this size: whole depth, square in plane, smallest first."""
    z, y, x = (edge // 16 * 16 or edge for edge in largest)
    found = [(min(64, z), min(edge, y), min(edge, x)) for edge in (*EDGES, max(y, x))]
    return sorted(set(found), key=lambda patch: patch[1] * patch[2])


def plan_patch(
    settings: Settings, patch: Index3, spacing_mm: Float3, budget_gib: float, ranks: int
) -> PatchOption:
    """What fits with this patch. Raises `UserError` when the network cannot take the patch."""
    settings = resolve_model(with_keys(settings, patch=patch, micro=1, levels=()), spacing_mm)
    one = estimate_memory(settings, ranks)
    if (
        one.gib <= budget_gib
    ):  # several samples at once only where nothing has to be recomputed for it
        room = (budget_gib - one.gib) * GIB / (one.parts["activations"] * (1 + ALLOCATOR_OVERHEAD))
        for size in range(min(1 + int(room), -(-settings.train.global_batch_size // ranks)), 1, -1):
            several = estimate_memory(with_keys(settings, micro=size), ranks)
            if several.gib <= budget_gib:
                return PatchOption(patch, one, size, several)
        return PatchOption(patch, one, 1, one)
    depth = len(settings.model.features or ())
    least = min(
        (estimate_memory(settings, ranks, levels=range(top)) for top in (1, 2, depth)),
        key=lambda found: found.gib,
    )
    return PatchOption(patch, one, int(least.gib <= budget_gib), least)


def best_option(
    options: Iterable[PatchOption], spacing_mm: Float3, budget_gib: float
) -> PatchOption | None:
    """The largest patch up to `FIELD_MM` that needs no recomputation; failing that, the largest that fits at all."""
    fitting = [o for o in options if o.micro_batch]
    useful = [
        o
        for o in fitting
        if max(o.patch_size[1] * spacing_mm[1], o.patch_size[2] * spacing_mm[2]) <= FIELD_MM
    ]
    plain = [o for o in useful or fitting[:1] if o.one.gib <= budget_gib]
    found = plain or useful or fitting
    return found[-1] if found else None


def estimate_strategies(settings: Settings, ranks: int) -> dict[str, MemoryEstimate]:
    """The need under each strategy, the same step otherwise."""
    found = {}
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
        found[label] = estimate_memory(
            settings.model_copy(update={"train": train}), ranks, levels=levels
        )
    return found


def with_keys(
    settings: Settings,
    patch: Index3 | None = None,
    micro: int | None = None,
    levels: tuple[int, ...] | None = None,
) -> Settings:
    """The settings with these keys changed."""
    given = {"micro_batch_size": micro, "activation_checkpointing": levels}
    train = settings.train.model_copy(
        update={key: value for key, value in given.items() if value is not None}
    )
    data = (
        settings.data if patch is None else settings.data.model_copy(update={"patch_size": patch})
    )
    return settings.model_copy(update={"train": train, "data": data})
