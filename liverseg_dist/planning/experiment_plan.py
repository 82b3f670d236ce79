"""A plan for training on a raw data set: fingerprint and memory in, settings with reasons out.

`plan_experiment` combines the rules of `experiment_rules` with the memory model of this package:
the patch is the largest one that the real training step fits into the given memory, not one from a
table. `plan_file` writes the result; `liverseg plan SRC` and `liverseg demo --data` use it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from liverseg_dist.config import Settings
from liverseg_dist.model.topology import PRESETS
from liverseg_dist.planning.experiment_memory import (
    MIN_BATCH,
    GpuBudget,
    PatchChoice,
    choose_patch,
    estimate_plan,
    largest_micro_batch,
)
from liverseg_dist.planning.experiment_rules import (
    Decision,
    VoxelChoice,
    choose_oversampling,
    choose_splits,
    choose_steps,
    choose_voxels,
    count_text,
    largest_batch,
    wanted_patch,
)
from liverseg_dist.planning.fingerprint import DatasetFingerprint
from liverseg_dist.planning.memory_fit import (
    replace_settings,
    resolve_model,
)
from liverseg_dist.planning.plan_settings import (
    GIVEN,
    ExperimentPlan,
    add_network_channels,
    build_settings,
    normalisation_decisions,
    replace_given,
)
from liverseg_dist.volume import Float3, Index3

RESENC_GIB, RESENC_CASES = 24.0, 50
"""https://arxiv.org/abs/2404.09556: residual encoders help most on large data sets, with 24 GB."""
PRESET_GIB = (("L", 40.0), ("M", 8.0), ("S", 3.0), ("tiny", 0.0))
"""Least memory for each preset; M has the width of nnU-Net, which plans for 8 GB."""
LARGE_CASES = 200
"""Cases from which the wide preset L is worth its time."""


def plan_experiment(
    fingerprint: DatasetFingerprint, budget: GpuBudget, given: Mapping[str, Any] | None = None
) -> ExperimentPlan:
    """Plan a training.

    Args:
        fingerprint: The data.
        budget: Memory and number of devices.
        given: Settings by dotted key that are fixed; the plan adapts the others to them.

    Raises:
        UserError: Nothing fits into the memory.
    """
    given = given or {}
    spacing = build_settings(given).convert.cleaning.spacing_mm
    # The user's voxel size decides everything after it: patch, topology and memory.
    voxels = choose_voxels(fingerprint, (spacing, GIVEN) if spacing else None)
    network = choose_network(fingerprint, budget)
    base = _base_settings(fingerprint, given, network, budget)
    # The patch is found with the widths of the preset, because they decide the memory.
    chosen = choose_patch(base, fingerprint, voxels.spacing_mm, budget)
    levels = PRESETS[base.model.preset].max_levels
    wanted, wanted_reason = wanted_patch(fingerprint, voxels.spacing_mm, levels)
    settings = resolve_model(
        replace_settings(base, chosen.patch, chosen.micro_batch, chosen.estimate.levels),
        voxels.spacing_mm,
    )
    batch = choose_batch(settings, fingerprint, voxels, budget, given)
    decisions = [
        *_voxel_decisions(voxels),
        *choose_splits(len(fingerprint.cases)),
        *normalisation_decisions(fingerprint),
        Decision(
            "data.patch_size",
            list(chosen.patch),
            _describe_patch(chosen, wanted, wanted_reason, budget),
        ),
        Decision("data.oversample_foreground", *choose_oversampling(fingerprint)),
        *network,
        *_topology_decisions(settings, voxels.spacing_mm),
        *batch.decisions,
    ]
    summary = _summarise(fingerprint, batch.settings, budget)
    return ExperimentPlan(replace_given(decisions, given), batch.settings, summary)


def choose_network(fingerprint: DatasetFingerprint, budget: GpuBudget) -> list[Decision]:
    """Choose architecture and preset by memory and number of cases."""
    cases, gib = len(fingerprint.cases), budget.memory_gib
    if gib >= RESENC_GIB and cases >= RESENC_CASES:
        architecture = Decision(
            "model.architecture",
            "resenc",
            f"{cases} cases and {gib:g} GiB: a residual encoder is better (arXiv 2404.09556)",
        )
    else:
        architecture = Decision(
            "model.architecture",
            "unet",
            f"nnU-Net's plain U-Net; a residual encoder from {RESENC_GIB:g} GiB and "
            f"{RESENC_CASES} cases on",
        )
    for preset, least in PRESET_GIB:
        if gib >= least and (preset != "L" or cases >= LARGE_CASES):
            break
    width = PRESETS[preset]
    reason = (
        f"for {gib:g} GiB: {width.base} to {width.cap} channels, at most {width.max_levels} levels"
        f"{' (the width of nnU-Net)' if preset == 'M' else ''}"
    )
    return [architecture, Decision("model.preset", preset, reason)]


# --- batch --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchChoice:
    """Decisions of the section `train`, and the settings with them."""

    decisions: tuple[Decision, ...]
    settings: Settings


def choose_batch(
    settings: Settings,
    fingerprint: DatasetFingerprint,
    voxels: VoxelChoice,
    budget: GpuBudget,
    given: Mapping[str, Any],
) -> BatchChoice:
    """Choose batch, micro-batch, steps and the remaining settings of `train`."""
    train, devices = settings.train, budget.devices
    limit = largest_batch(fingerprint, voxels, settings.data.patch_size)
    micro = train.micro_batch_size
    if not train.activation_checkpointing:
        # Recomputed levels were chosen for one sample; more at once would not fit.
        micro = largest_micro_batch(settings, budget, max(micro, -(-limit // devices)))
    batch = max(MIN_BATCH, devices, min(micro * devices, limit))
    # Every rank computes as many samples.
    batch = given.get("train.global_batch_size", -(-batch // devices) * devices)
    micro = min(micro, -(-batch // devices))
    steps, steps_reason = choose_steps(len(fingerprint.cases), batch)
    levels = list(settings.train.activation_checkpointing)
    update = {"global_batch_size": batch, "micro_batch_size": micro, "max_steps": steps}
    # What the user gives decides the memory that is reported.
    own = build_settings(given).train
    for name in (*update, "activation_checkpointing"):
        if f"train.{name}" in given:
            update[name] = getattr(own, name)
    chosen = settings.model_copy(update={"train": train.model_copy(update=update)})
    steps = chosen.train.max_steps
    # Ten checkpoints of a short run, one per 1000 steps of a long one.
    every = max(1, min(1000, steps // 10))
    decisions = [
        Decision("train.max_steps", steps, steps_reason),
        Decision(
            "train.global_batch_size",
            batch,
            f"nnU-Net: at least 2, at most 5 % of the data's voxels ({limit} samples); "
            f"{count_text(devices, 'device')}",
        ),
        Decision("train.micro_batch_size", micro, _describe_micro(micro, batch, devices)),
        Decision("train.precision", budget.precision, _describe_precision(budget.precision)),
        Decision(
            "train.activation_checkpointing",
            levels or "none",
            "these levels are recomputed in backward, which makes room for a larger patch"
            if levels
            else "the patch fits without recomputation, which would cost up to a third more time",
        ),
        Decision(
            "memory.budget_gib",
            budget.memory_gib,
            f"memory of a device; the plan needs {estimate_plan(chosen, budget).gib:.2f} GiB of it",
        ),
        Decision("checkpoint.every_steps", every, "ten or more checkpoints in a run"),
        Decision(
            "validation.every_steps",
            # Each validation takes the time of many steps; more than 50 would dominate a run.
            max(every, steps // 50),
            "about 50 validations in a run, as their curve shows overfitting",
        ),
        Decision("inference.precision", budget.precision, "as in training"),
    ]
    return BatchChoice(tuple(decisions), chosen)


def _describe_micro(micro: int, batch: int, devices: int) -> str:
    rounds = -(-batch // (micro * devices))
    if rounds > 1:
        return f"what fits at once; {rounds} of them are accumulated for one step"
    return "a device's share of the batch fits at once"


def _describe_precision(precision: str) -> str:
    if precision == "bf16":
        return "half the memory of fp32; GPUs from 2020 on (Ampere) have it, else use fp16"
    return f"given for this plan: {precision}"


# --- the other sections -------------------------------------------------------------------------


def _voxel_decisions(voxels: VoxelChoice) -> list[Decision]:
    return [
        Decision("convert.cleaning.spacing_mm", list(voxels.spacing_mm), voxels.spacing_reason),
        Decision("convert.slab.policy", voxels.policy, voxels.policy_reason),
    ]


def _topology_decisions(settings: Settings, spacing_mm: Float3) -> list[Decision]:
    model = settings.model
    assert model.features
    assert model.strides
    assert model.kernels
    lowest = list(settings.data.patch_size)
    for stride in model.strides:
        # Rounded up: a padded convolution of stride 2 keeps the odd voxel.
        lowest = [-(-edge // step) for edge, step in zip(lowest, stride, strict=True)]
    voxel = "x".join(f"{step:g}" for step in spacing_mm)
    return [
        Decision(
            "model.features",
            list(model.features),
            f"{len(model.features)} levels, until an edge has 4 voxels; each twice as wide",
        ),
        Decision(
            "model.strides",
            [list(stride) for stride in model.strides],
            f"nnU-Net: halve axes within a factor 2 of the finest one ({voxel} mm); the lowest "
            f"level has {'x'.join(map(str, lowest))} voxels",
        ),
        Decision(
            "model.kernels",
            [list(kernel) for kernel in model.kernels],
            "nnU-Net: 1 along an axis until its voxels are within a factor 2 of the finest",
        ),
    ]


def _describe_patch(
    chosen: PatchChoice, wanted: Index3, wanted_reason: str, budget: GpuBudget
) -> str:
    if chosen.patch == wanted:
        return f"holds {wanted_reason}, and fits {budget.memory_gib:g} GiB"
    full = "x".join(map(str, wanted))
    return (
        f"largest that fits {budget.memory_gib:g} GiB, shortened along the axis that is longest "
        f"relative to the median scan (nnU-Net); {full} would hold {wanted_reason}"
    )


def _base_settings(
    fingerprint: DatasetFingerprint,
    given: Mapping[str, Any],
    network: Sequence[Decision],
    budget: GpuBudget,
) -> Settings:
    """Return the settings that the memory search starts from; given ones come last."""
    values: dict[str, Any] = {decision.key: decision.value for decision in network}
    # The precision decides the bytes of an activation, so it must be set before the search.
    values["train.precision"] = budget.precision
    values["train.global_batch_size"] = max(MIN_BATCH, budget.devices)
    settings = build_settings(values | dict(given))
    return add_network_channels(settings, fingerprint)


def _summarise(
    fingerprint: DatasetFingerprint, settings: Settings, budget: GpuBudget
) -> dict[str, Any]:
    need = estimate_plan(settings, budget)
    return {
        "fingerprint": fingerprint.to_summary(),
        "gpu_memory_gib": budget.memory_gib,
        "devices": budget.devices,
        "need_gib": round(need.gib, 3),
        "parts_gib": {name: round(size / 2**30, 4) for name, size in need.parts.items()},
        "tflop_per_micro_batch": round(need.flops / 1e12, 3),
    }
