"""A plan for a short training on CPU cores: coarse voxels, a tiny network, steps by the clock.

`liverseg plan SRC --cpu-minutes N` and `liverseg demo --data` use it. Its settings are those of
`configs/demo_cpu.yaml`; only voxel size, patch and number of steps depend on the data and on time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from liverseg_dist.config import Settings
from liverseg_dist.planning.experiment_rules import (
    COVERED_PERCENTILE,
    Decision,
    VoxelChoice,
    choose_splits,
    choose_voxels,
    count_text,
    median_spacing,
    smaller_patches,
    stored_shape,
    wanted_patch,
)
from liverseg_dist.planning.fingerprint import DatasetFingerprint
from liverseg_dist.planning.memory_estimate import trace_micro_batch
from liverseg_dist.planning.memory_fit import replace_settings, resolve_model
from liverseg_dist.planning.plan_settings import (
    GIVEN,
    ExperimentPlan,
    add_network_channels,
    build_settings,
    normalisation_decisions,
    replace_given,
)
from liverseg_dist.volume import Float3, Index3

PRESET = "tiny"
LEVELS = 4
PATCH_VOXELS = 32 * 48 * 48
"""The patch of `configs/demo_cpu.yaml`: a step of two takes about 0.2 s on two cores."""
GFLOPS_PER_CORE = 25.0
"""Speed of a training step. The demo's 800 steps of 12 GFLOP took 172 s on two cores, 28 each."""
TRAINING_SHARE = 0.75
"""The rest of the time goes to conversion, validation and evaluation."""
# Fewer steps than 50 teach a network nothing; more than 20,000 are beyond what a CPU is used for.
MIN_STEPS, MAX_STEPS = 50, 20_000
BATCH = 2
MIN_VOXEL_MM = 1.0
VOXELS_PER_LESION = 3.0


def plan_for_cpu(
    fingerprint: DatasetFingerprint,
    minutes: float,
    cores: int,
    given: Mapping[str, Any] | None = None,
) -> ExperimentPlan:
    """Plan a training that ends within the given time.

    Args:
        fingerprint: The data.
        minutes: Time for conversion, training and evaluation together.
        cores: CPU cores of all processes.
        given: Settings by dotted key that are fixed.

    Raises:
        UserError: A setting is wrong.
    """
    given = given or {}
    spacing = build_settings(given).convert.cleaning.spacing_mm
    wanted = (spacing, GIVEN) if spacing else coarse_spacing(fingerprint)
    voxels = choose_voxels(fingerprint, wanted)
    decisions = [
        Decision("convert.cleaning.spacing_mm", list(voxels.spacing_mm), voxels.spacing_reason),
        Decision("convert.slab.policy", voxels.policy, voxels.policy_reason),
        *choose_splits(len(fingerprint.cases)),
        *normalisation_decisions(fingerprint),
        *_network_decisions(fingerprint, voxels),
    ]
    settings = _resolve(replace_given(decisions, given), voxels.spacing_mm, fingerprint)
    steps, reason = choose_cpu_steps(settings, minutes, cores)
    decisions.append(Decision("train.max_steps", steps, reason))
    decisions += _schedule_decisions(given.get("train.max_steps", steps))
    kept = replace_given(decisions, given)
    summary = {"fingerprint": fingerprint.to_summary(), "cpu_minutes": minutes, "cores": cores}
    return ExperimentPlan(kept, _resolve(kept, voxels.spacing_mm, fingerprint), summary)


def coarse_spacing(fingerprint: DatasetFingerprint) -> tuple[Float3, str]:
    """Return voxels (z, y, x) with which one small patch holds most of the structures."""
    median, _ = median_spacing(fingerprint)
    boxes = fingerprint.foregrounds_mm
    if not len(boxes):
        # Without any labelled structure the whole scan is what the patch should hold.
        boxes = fingerprint.shapes_at((1.0, 1.0, 1.0))
    box = np.percentile(boxes, COVERED_PERCENTILE, axis=0)
    # A cube in mm: no direction of the body is preferred.
    edge = max(MIN_VOXEL_MM, float(np.cbrt(box.prod() / PATCH_VOXELS)))
    reason = f"{PATCH_VOXELS:,} voxels hold the structures' box of {_format_box(box)} mm"
    # Lesions decide where they are small: a lesion below three voxels cannot be learned.
    diameters = fingerprint.lesion_diameters_mm
    if len(diameters) and np.median(diameters) / VOXELS_PER_LESION < edge:
        edge = max(MIN_VOXEL_MM, float(np.median(diameters)) / VOXELS_PER_LESION)
        reason = f"a lesion of {np.median(diameters):.1f} mm, the median, is 3 voxels wide"
    # Never finer than the scans.
    z, y, x = (round(max(edge, step), 2) for step in median)
    return (z, y, x), f"coarse, for a CPU: {reason}"


def choose_cpu_steps(settings: Settings, minutes: float, cores: int) -> tuple[int, str]:
    """Return the steps that fit into the time, and the reason."""
    flops = BATCH * trace_micro_batch(settings, device="cpu").flops
    seconds = 60 * minutes * TRAINING_SHARE
    # Counted on the real training step, so that patch, widths and levels are all included.
    steps = int(seconds * cores * GFLOPS_PER_CORE * 1e9 / flops)
    # Whole tens, because a planned number should not pretend to more accuracy than it has.
    steps = min(MAX_STEPS, max(MIN_STEPS, steps // 10 * 10))
    reason = (
        f"{TRAINING_SHARE:.0%} of {minutes:g} min on {count_text(cores, 'core')} at about "
        f"{GFLOPS_PER_CORE:g} GFLOP/s each, {flops / 1e9:.1f} GFLOP a step"
    )
    return steps, reason


def _network_decisions(fingerprint: DatasetFingerprint, voxels: VoxelChoice) -> list[Decision]:
    patch = _choose_patch(fingerprint, voxels.spacing_mm)
    demo = "as configs/demo_cpu.yaml, which was measured on phantoms"
    return [
        Decision(
            "data.patch_size", list(patch), f"at most about {PATCH_VOXELS:,} voxels, for a CPU"
        ),
        Decision("data.augmentation", "none", f"{demo}; it needs more steps than fit here"),
        Decision("data.oversample_foreground", 0.67, f"{demo}: few steps, so most show structures"),
        Decision("model.preset", PRESET, "8 to 64 channels, for CPUs"),
        Decision("train.global_batch_size", BATCH, "nnU-Net: at least 2"),
        Decision("train.optimizer", "adamw", f"{demo}; converges in few steps"),
        Decision("train.learning_rate", 3.0e-3, demo),
        Decision("train.weight_decay", 1.0e-2, demo),
        Decision("train.schedule.name", "cosine", demo),
        Decision("train.ema_decay", 0.99, f"{demo}: smooths the last of few steps"),
    ]


def _schedule_decisions(steps: int) -> list[Decision]:
    # Few checkpoints: writing one costs as much as several steps of a tiny network.
    every = max(1, steps // 4)
    return [
        Decision("train.schedule.warmup_steps", min(20, steps // 10), "a few steps of warm-up"),
        Decision("checkpoint.every_steps", every, "four checkpoints"),
        Decision("validation.every_steps", max(1, steps // 2), "two validations: they cost time"),
        Decision("validation.max_cases", 3, "a validation costs as much as many steps"),
    ]


def _choose_patch(fingerprint: DatasetFingerprint, spacing_mm: Float3) -> Index3:
    largest, _ = wanted_patch(fingerprint, spacing_mm, LEVELS)
    median = stored_shape(fingerprint, spacing_mm)
    patches = smaller_patches(largest, median, spacing_mm, LEVELS)
    for patch in patches:
        # Multiples of the pooling rarely meet the number exactly.
        if np.prod(patch) <= 1.1 * PATCH_VOXELS:
            return patch
    return patches[-1]


def _resolve(
    decisions: Sequence[Decision], spacing_mm: Float3, fingerprint: DatasetFingerprint
) -> Settings:
    """Return the settings of a plan with the topology filled in."""
    settings = build_settings({decision.key: decision.value for decision in decisions})
    settings = add_network_channels(settings, fingerprint)
    return resolve_model(replace_settings(settings, micro=1, levels=()), spacing_mm)


def _format_box(box: np.ndarray) -> str:
    return " x ".join(f"{edge:.0f}" for edge in box)
