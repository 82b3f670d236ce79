"""Training steps of the shipped configurations, and of nnU-Net's networks of the same topology.

Ours is the complete step of `liverseg train` (`training.step.Stepper`): forward, loss with deep
supervision, backward, clipping, optimizer, metrics. nnU-Net's is the step of its trainer: its loss
where nnunetv2 is installed, gradient scaling with fp16, the same clipping and optimizer. Both get
one batch that stays on the device. Peaks are compared with what `liverseg plan` predicts.
"""

from collections.abc import Callable, Sequence
from itertools import count

import torch
from peer_networks import build_nnunet
from step import set_arithmetic
from step_timing import time_calls
from torch import nn

from liverseg_dist.planning.memory_estimate import GIB, estimate_memory
from liverseg_dist.precision import autocast
from liverseg_dist.training.components import build_components
from liverseg_dist.training.step import Stepper

from .context import Context, Figures, first_line
from .data import (
    CONFIGS,
    RepeatedBatch,
    load_one_batch,
    load_preset,
    phantom_store,
    single_world,
)
from .nnunet_loss import build_nnunet_loss

STEPS, WARM_UP = 20, 8
EAGER = ("train.compile=false", "train.channels_last=false", "train.deterministic=false")
VARIANTS: dict[str, tuple[str, ...]] = {
    "as configured": (),
    "eager, bf16": (*EAGER, "train.precision=bf16"),
    "eager, channels last, bf16": (*EAGER, "train.precision=bf16", "train.channels_last=true"),
    "eager, deterministic, bf16": (*EAGER, "train.precision=bf16", "train.deterministic=true"),
    "eager, fp16": (*EAGER, "train.precision=fp16"),
    "eager, tf32": (*EAGER, "train.precision=tf32"),
    "eager, fp32": (*EAGER, "train.precision=fp32"),
}
COMPILED: dict[str, tuple[str, ...]] = {
    "compiled, bf16": (*EAGER, "train.precision=bf16", "train.compile=true"),
    "compiled, channels last, bf16": (
        *EAGER, "train.precision=bf16", "train.compile=true", "train.channels_last=true",
    ),
}  # fmt: skip
"""Measured last: compilation takes most of the time of this section."""
NNUNET_PACKAGES = ("dynamic_network_architectures",)
EAGER_S, COMPILE_S = 6.0, 45.0
"""Seconds that a case may take, to decide whether it still fits the section."""


def run(context: Context) -> None:
    phantom_store(context)
    for preset in CONFIGS:
        # The CPU mode runs every variant, but of one network only.
        variants = list(VARIANTS.items())[: None if preset == "M" or not context.is_small else 1]
        for variant, overrides in variants:
            measure_ours(context, preset, variant, overrides, EAGER_S)
        for precision in ("fp16", "bf16"):
            measure_nnunet(context, preset, precision, compiles=False)
    for preset in CONFIGS:
        for variant, overrides in COMPILED.items():
            measure_ours(context, preset, variant, overrides, COMPILE_S)
        measure_nnunet(context, preset, "bf16", compiles=True)


def measure_ours(
    context: Context, preset: str, variant: str, overrides: Sequence[str], needs_s: float
) -> None:
    context.measure(
        preset,
        f"liverseg, {variant}",
        lambda: time_our_step(context, preset, overrides),
        needs_s=needs_s,
        needs_cuda="tf32" in variant or variant in COMPILED,
    )


def measure_nnunet(context: Context, preset: str, precision: str, *, compiles: bool) -> None:
    context.measure(
        preset,
        f"nnU-Net, {'compiled' if compiles else 'eager'}, {precision}",
        lambda: time_nnunet_step(context, preset, precision, compiles=compiles),
        packages=NNUNET_PACKAGES,
        needs_s=COMPILE_S if compiles else EAGER_S,
        needs_cuda=compiles,
    )


def time_our_step(context: Context, preset: str, overrides: Sequence[str]) -> Figures:
    settings = load_preset(context, preset, adapt(context, overrides))
    store = phantom_store(context)
    torch._dynamo.reset()
    parts = build_components(settings, store, single_world(context))
    stepper = Stepper(settings, parts.strategy, parts.loss, lambda *_: None, lambda _: None)
    batches = RepeatedBatch(load_one_batch(context, settings, store))
    numbers = count()

    def step() -> None:
        stepper.run(next(numbers), batches, lambda: False)  # type: ignore[arg-type]

    found = time_step(context, step)
    estimate = estimate_memory(settings, 1, context.device.type)
    margin_gib = estimate.parts["margin"] / GIB
    found["predicted_gib"] = estimate.gib - margin_gib
    found["predicted_with_margin_gib"] = estimate.gib
    found["tflop_per_s"] = estimate.flops / (found["ms"] / 1e3) / 1e12
    return found


def time_nnunet_step(context: Context, preset: str, precision: str, *, compiles: bool) -> Figures:
    settings = load_preset(context, preset)
    batch = load_one_batch(context, settings, phantom_store(context))
    set_arithmetic(precision)
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    torch._dynamo.reset()
    model: nn.Module = build_nnunet(settings.model, deep_supervision=True).to(context.device)
    if compiles:
        model.compile(dynamic=False)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5
    )
    used = "fp32" if context.is_small else precision
    scaler = torch.amp.GradScaler(context.device.type, enabled=used == "fp16")
    loss, name = build_nnunet_loss(settings)
    loss.to(context.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(context.device.type, used):
            outputs = model(batch.image_BCDHW)
            value = loss(outputs, batch.label_BDHW)
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 12)
        scaler.step(optimizer)
        scaler.update()
        # Its trainer reads the loss in every step.
        value.item()

    return {**time_step(context, step), "loss": name}


def time_step(context: Context, step: Callable[[], None]) -> Figures:
    """Milliseconds of a step, launches, and peak memory with everything that is allocated."""
    for _ in range(context.choose(WARM_UP, 1)):
        step()
    device = context.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    timing = time_calls(step, context.choose(STEPS, 1), device)
    found: Figures = {"ms": timing.median_s * 1e3, "least_ms": timing.least_s * 1e3}
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        found["reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
        # The figures above must not be lost where the profiler cannot be used.
        try:
            found |= count_kernels(step, timing.median_s)
        except (RuntimeError, AttributeError) as error:
            found["launches"] = f"not counted: {first_line(error)}"
    return found


def count_kernels(step: Callable[[], None], seconds: float) -> Figures:
    """Launches of one step, and the share of its time in which the GPU computes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type.name == "CUDA"]
    busy_s = sum(event.device_time for event in kernels) / 1e6
    return {"launches": len(kernels), "busy_share": busy_s / seconds}


def adapt(context: Context, overrides: Sequence[str]) -> list[str]:
    """In the CPU mode replace 16-bit arithmetic, which CPUs may compute hundreds of times slower."""
    if not context.is_small:
        return list(overrides)
    return [text for text in overrides if not text.startswith("train.precision=")]
