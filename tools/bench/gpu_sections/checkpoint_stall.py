"""How long training waits for a checkpoint, and the cost of the operations beside forward and backward."""

import shutil
import time
from collections.abc import Callable

import torch
from step_timing import time_calls

from liverseg_dist.training.checkpoint import Checkpoints
from liverseg_dist.training.components import build_components
from liverseg_dist.training.ema import Ema

from .context import Context, Figures
from .data import load_preset, phantom_store, single_world

SAVES = 3


def run(context: Context) -> None:
    context.measure("checkpoint, M with AdamW", "", lambda: measure_stall(context), needs_s=8)
    context.measure("copy of the state to the host, M", "", lambda: measure_copies(context))
    for name in ("weight average", "gradient norm and clipping", "optimizer", "optimizer, fused"):
        context.measure("beside forward and backward, M", name, lambda n=name: measure(context, n))


def build(context: Context, *overrides: str) -> tuple:
    """Settings and components of the M configuration."""
    settings = load_preset(context, "M", ["train.optimizer=adamw", *overrides])
    return settings, build_components(settings, phantom_store(context), single_world(context))


def measure_stall(context: Context) -> Figures:
    _, parts = build(context)
    folder = context.work / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints = Checkpoints(folder, keep_last=1)
    stalls, writes = [], []
    size = 0
    for number in range(context.choose(SAVES, 1)):
        synchronize(context)
        started = time.perf_counter()
        tensors = parts.strategy.state()
        checkpoints.save(number, tensors, {})
        stalls.append(time.perf_counter() - started)
        checkpoints.finish()
        writes.append(time.perf_counter() - started)
        size = sum(tensor.nbytes for tensor in tensors.values())
    checkpoints.close()
    return {
        "stall_ms": min(stalls) * 1e3,
        "until_written_ms": min(writes) * 1e3,
        "size_mib": size / 2**20,
    }


def measure_copies(context: Context) -> Figures:
    """The same tensors into pageable and into pinned memory."""
    _, parts = build(context)
    tensors = list(parts.strategy.state().values())
    found: Figures = {}
    pageable = repeat(context, lambda: [tensor.to("cpu", copy=True) for tensor in tensors])
    found["pageable_ms"] = pageable * 1e3
    if context.device.type == "cuda":
        targets = [torch.empty_like(t, device="cpu").pin_memory() for t in tensors]

        def copy_pinned() -> None:
            for target, tensor in zip(targets, tensors, strict=True):
                target.copy_(tensor, non_blocking=True)

        found["pinned_ms"] = repeat(context, copy_pinned) * 1e3
    return found


def measure(context: Context, name: str) -> Figures:
    _, parts = build(context)
    model, optimizer = parts.strategy.plain, parts.strategy.optimizer
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    ema = Ema(model, 0.99)
    if name == "optimizer, fused":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    actions: dict[str, Callable[[], object]] = {
        "weight average": lambda: ema.update(model, 1000),
        "gradient norm and clipping": lambda: torch.nn.utils.clip_grad_norm_(
            model.parameters(), 12
        ),
        "optimizer": optimizer.step,
        "optimizer, fused": optimizer.step,
    }
    action = actions[name]
    for _ in range(context.choose(5, 1)):
        action()
    timing = time_calls(action, context.choose(20, 2), context.device)
    return {"ms": timing.median_s * 1e3}


def repeat(context: Context, action: Callable[[], object]) -> float:
    """Least seconds of three calls on the clock."""
    times = []
    for _ in range(context.choose(3, 1)):
        synchronize(context)
        started = time.perf_counter()
        action()
        synchronize(context)
        times.append(time.perf_counter() - started)
    return min(times)


def synchronize(context: Context) -> None:
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)
