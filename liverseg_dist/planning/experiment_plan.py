"""A plan for training on a raw data set: fingerprint and memory in, settings with reasons out.

`plan_experiment` combines the rules of `experiment_rules` with the memory model of this package:
the patch is the largest one that the real training step fits into the given memory, not one from a
table. `plan_file` writes the result; `liverseg plan SRC` and `liverseg demo --data` use it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from liverseg_dist.config import Settings, load_settings
from liverseg_dist.errors import UserError
from liverseg_dist.model.topology import PRESETS
from liverseg_dist.planning.experiment_rules import (
    Decision,
    VoxelChoice,
    choose_oversampling,
    choose_splits,
    choose_steps,
    choose_voxels,
    count_text,
    largest_batch,
    smaller_patches,
    stored_shape,
    wanted_patch,
)
from liverseg_dist.planning.fingerprint import DatasetFingerprint
from liverseg_dist.planning.memory_estimate import MemoryEstimate, estimate_memory
from liverseg_dist.planning.memory_fit import (
    replace_settings,
    resolve_checkpointing,
    resolve_model,
)
from liverseg_dist.volume import Float3, Index3

GIVEN = "given by the user"
MIN_BATCH = 2
"""nnU-Net: at least two samples per step."""
WORTH_IT = 1.25
"""A patch must gain this many voxels to justify accumulation or recomputation."""
RESENC_GIB, RESENC_CASES = 24.0, 50
"""https://arxiv.org/abs/2404.09556: residual encoders help most on large data sets, with 24 GB."""
PRESET_GIB = (("L", 40.0), ("M", 8.0), ("S", 3.0), ("tiny", 0.0))
"""Least memory for each preset; M has the width of nnU-Net, which plans for 8 GB."""
LARGE_CASES = 200
"""Cases from which the wide preset L is worth its time."""


@dataclass(frozen=True)
class GpuBudget:
    """Devices to plan for."""

    memory_gib: float
    devices: int = 1
    precision: str = "bf16"


@dataclass(frozen=True)
class ExperimentPlan:
    """The decisions, in the order of the file, and what they cost."""

    decisions: tuple[Decision, ...]
    settings: Settings
    """With the decisions and the topology filled in."""
    summary: dict[str, Any]
    """Figures for `--json` and the printed text."""

    def value(self, key: str) -> Any:
        """Return the value of a decision; None if the plan leaves the default."""
        return next((d.value for d in self.decisions if d.key == key), None)


@dataclass(frozen=True)
class PatchChoice:
    """A patch with the micro-batch and recomputed levels that it needs."""

    patch: Index3
    micro_batch: int
    estimate: MemoryEstimate


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
    voxels = choose_voxels(fingerprint, (spacing, GIVEN) if spacing else None)
    network = choose_network(fingerprint, budget)
    base = _base_settings(fingerprint, given, network, budget)
    chosen = choose_patch(base, fingerprint, voxels.spacing_mm, budget)
    levels = PRESETS[base.model.preset].max_levels
    wanted, wanted_reason = wanted_patch(fingerprint, voxels.spacing_mm, levels)
    settings = resolve_model(
        replace_settings(base, chosen.patch, chosen.micro_batch, chosen.estimate.levels),
        voxels.spacing_mm,
    )
    batch = choose_batch(settings, fingerprint, voxels, budget)
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
        patches = smaller_patches(wanted, median, spacing_mm, levels)
    together = -(-MIN_BATCH // budget.devices)
    best: PatchChoice | None = None
    for micro, recompute in ((together, False), (1, False), (1, True)):
        found = _largest_fitting(base, patches, spacing_mm, budget, micro, recompute)
        if found is None:
            continue
        if best is None or np.prod(found.patch) >= WORTH_IT * np.prod(best.patch):
            best = found
        if best.patch == patches[0]:
            break
    if best is None:
        least = _estimate(base, patches[-1], spacing_mm, budget, 1, recompute=True)
        voxels = "x".join(map(str, patches[-1]))
        raise UserError(
            f"--gpu-memory-gib {budget.memory_gib:g}: one sample of {voxels} needs "
            f"{least.gib:.2f} GiB ({least.describe_parts()}); use a smaller model.preset, or "
            "--cpu-minutes for a plan without a GPU"
        )
    return best


def _largest_fitting(
    base: Settings,
    patches: Sequence[Index3],
    spacing_mm: Float3,
    budget: GpuBudget,
    micro: int,
    recompute: bool,
) -> PatchChoice | None:
    """Return the first of the patches, in descending size, that fits; None if none does."""

    def estimate(number: int) -> MemoryEstimate:
        return _estimate(base, patches[number], spacing_mm, budget, micro, recompute)

    number = _first_true(len(patches), lambda n: estimate(n).gib <= budget.memory_gib)
    if number is None:
        return None
    if not recompute:
        return PatchChoice(patches[number], micro, estimate(number))
    # As few levels as the memory allows, for the chosen patch only: this takes many estimates.
    settings = resolve_model(replace_settings(base, patches[number], micro, ()), spacing_mm)
    update = {"activation_checkpointing": "auto"}
    auto = settings.model_copy(update={"train": settings.train.model_copy(update=update)})
    least = resolve_checkpointing(auto, budget.memory_gib, budget.devices, "cuda")
    return PatchChoice(patches[number], micro, least)


def _first_true(count: int, test: Callable[[int], bool]) -> int | None:
    """Return the first number below `count` that passes a test which is False, then True.

    By bisection, because each estimate runs the training step on tensors without memory.
    """
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


# --- batch --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchChoice:
    """Decisions of the section `train`, and the settings with them."""

    decisions: tuple[Decision, ...]
    settings: Settings


def choose_batch(
    settings: Settings, fingerprint: DatasetFingerprint, voxels: VoxelChoice, budget: GpuBudget
) -> BatchChoice:
    """Choose batch, micro-batch, steps and the remaining settings of `train`."""
    train, devices = settings.train, budget.devices
    limit = largest_batch(fingerprint, voxels, settings.data.patch_size)
    micro = train.micro_batch_size
    if not train.activation_checkpointing:
        micro = _largest_micro_batch(settings, budget, max(micro, -(-limit // devices)))
    batch = max(MIN_BATCH, devices, min(micro * devices, limit))
    # Every rank computes as many samples.
    batch = -(-batch // devices) * devices
    micro = min(micro, batch // devices)
    steps, steps_reason = choose_steps(len(fingerprint.cases), batch)
    every = max(1, min(1000, steps // 10))
    levels = list(settings.train.activation_checkpointing)
    update = {
        "global_batch_size": batch,
        "micro_batch_size": micro,
        "max_steps": steps,
    }
    chosen = settings.model_copy(update={"train": train.model_copy(update=update)})
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
            f"memory of a device; the plan needs {_need(chosen, budget).gib:.2f} GiB of it",
        ),
        Decision("checkpoint.every_steps", every, "ten or more checkpoints in a run"),
        Decision(
            "validation.every_steps",
            max(every, steps // 50),
            "about 50 validations in a run, as their curve shows overfitting",
        ),
        Decision("inference.precision", budget.precision, "as in training"),
    ]
    return BatchChoice(tuple(decisions), chosen)


def _largest_micro_batch(settings: Settings, budget: GpuBudget, most: int) -> int:
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


def _need(settings: Settings, budget: GpuBudget) -> MemoryEstimate:
    levels = settings.train.activation_checkpointing
    assert not isinstance(levels, str)
    return estimate_memory(settings, budget.devices, levels=levels)


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


def normalisation_decisions(fingerprint: DatasetFingerprint) -> list[Decision]:
    """Choose how each channel is normalised."""
    channels = fingerprint.channels
    if len(channels) == 1 and channels[0].intensity == "ct":
        low, middle, high = fingerprint.foreground_percentiles(0, (0.5, 50, 99.5)) or (0, 0, 0)
        reason = (
            "CT as in nnU-Net: clip to the foreground's 0.5 and 99.5 percentiles "
            f"({low:.0f} and {high:.0f} HU, median {middle:.0f}), then its mean and deviation"
        )
        return [Decision("convert.cleaning.outliers", "percentile", reason)]
    value, reasons = [], []
    for channel in channels:
        value.append(
            {"name": channel.name, "modality": channel.modality, "intensity": channel.intensity}
        )
        reasons.append(f"{channel.name}: {_INTENSITY_REASONS[channel.intensity]}")
    return [Decision("convert.channels", value, "; ".join(reasons))]


_INTENSITY_REASONS = {
    "ct": "clip to the foreground's percentiles, one mean and deviation for all scans (HU agree)",
    "zscore": "mean and deviation of each scan, because its unit is arbitrary (nnU-Net)",
    "percentiles": "the range of each scan, because its unit is arbitrary",
    "range": "a fixed range",
}


def _topology_decisions(settings: Settings, spacing_mm: Float3) -> list[Decision]:
    model = settings.model
    assert model.features
    assert model.strides
    assert model.kernels
    lowest = list(settings.data.patch_size)
    for stride in model.strides:
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
    values["train.precision"] = budget.precision
    values["train.global_batch_size"] = max(MIN_BATCH, budget.devices)
    settings = build_settings(values | dict(given))
    return add_network_channels(settings, fingerprint)


def add_network_channels(settings: Settings, fingerprint: DatasetFingerprint) -> Settings:
    """Return the settings with the network's inputs and outputs, which training takes from the
    store: they decide the memory, but are not written into the plan."""
    scheme = fingerprint.scheme
    classes = sum(1 for value, _ in scheme.values if value != scheme.ignore)
    outputs = len(scheme.structures) if settings.model.regions else classes
    update = {"in_channels": len(fingerprint.channels), "out_channels": outputs}
    return settings.model_copy(update={"model": settings.model.model_copy(update=update)})


def build_settings(values: Mapping[str, Any]) -> Settings:
    """Return settings from values by dotted key. Raises `UserError` where they do not fit."""
    texts = []
    for key, value in values.items():
        # Text is taken as written; JSON is YAML for everything else.
        texts.append(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    return load_settings([], texts)


def list_given(settings: Settings) -> dict[str, Any]:
    """Return the settings that a user has set, by dotted key."""
    found: dict[str, Any] = {}
    _flatten(settings.model_dump(mode="json", exclude_unset=True), "", found)
    return found


def _flatten(section: Mapping[str, Any], prefix: str, found: dict[str, Any]) -> None:
    for name, value in section.items():
        if isinstance(value, dict):
            _flatten(value, f"{prefix}{name}.", found)
        else:
            found[f"{prefix}{name}"] = value


def replace_given(decisions: Sequence[Decision], given: Mapping[str, Any]) -> tuple[Decision, ...]:
    """Return the decisions with the user's own values, so that the file holds all of them."""
    kept = [decision for decision in decisions if decision.key not in given]
    return (*kept, *(Decision(key, value, GIVEN) for key, value in given.items()))


def _summarise(
    fingerprint: DatasetFingerprint, settings: Settings, budget: GpuBudget
) -> dict[str, Any]:
    need = _need(settings, budget)
    return {
        "fingerprint": fingerprint.to_summary(),
        "gpu_memory_gib": budget.memory_gib,
        "devices": budget.devices,
        "need_gib": round(need.gib, 3),
        "parts_gib": {name: round(size / 2**30, 4) for name, size in need.parts.items()},
        "tflop_per_micro_batch": round(need.flops / 1e12, 3),
    }
