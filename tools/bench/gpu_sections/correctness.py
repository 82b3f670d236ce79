"""Results, not speed: differences from float64, equal bytes of equal runs, equal bytes after a resume."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from liverseg_dist.model import build_model
from liverseg_dist.model.losses import build_loss
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.precision import autocast

from .context import Context, Figures
from .data import CONFIGS, common_overrides, load_preset, phantom_store, run_command

STEPS = 20
ARITHMETIC = ("fp32", "tf32", "bf16", "fp16")


def run(context: Context) -> None:
    for precision in ARITHMETIC:
        for layout in ("NCDHW", "NDHWC"):
            context.measure(
                "against float64, S",
                f"{precision}, {layout}",
                lambda p=precision, form=layout: compare_with_float64(context, p, form),
                needs_cuda=precision == "tf32",
            )
    for is_deterministic in (True, False):
        name = "deterministic" if is_deterministic else "not deterministic"
        context.measure(
            "hashes of training runs, S", name, lambda d=is_deterministic: hash_runs(context, d),
            needs_s=20, needs_cuda=not is_deterministic,
        )  # fmt: skip


def compare_with_float64(context: Context, precision: str, layout: str) -> Figures:
    """Relative differences (2-norm) of logits, loss and gradients, weights and input being equal.

    fp32 arithmetic is near 1e-6, tf32 near 3e-4, 16-bit types between 1e-3 and 1e-1 (gradients).
    """
    settings = load_preset(context, "S")
    shape = context.choose((32, 64, 64), (8, 16, 16))
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    model = build_model(settings.model).to(context.device)
    outputs = OutputChannels(settings.data.label_scheme, settings.model.regions)
    loss = build_loss(settings.loss, outputs).to(context.device)
    image = torch.randn(2, 1, *shape, device=context.device)
    label = torch.randint(0, 3, (2, *shape), device=context.device, dtype=torch.uint8)
    form = torch.channels_last_3d if layout == "NDHWC" else torch.contiguous_format
    inexact = compute(model.to(memory_format=form), loss, image.contiguous(memory_format=form),
                      label, precision)  # fmt: skip
    model.to(memory_format=torch.contiguous_format)
    exact = compute(model.double(), loss, image.double(), label, "fp32")
    names = ("logits", "loss", "gradients")
    found: Figures = {}
    for name, value, truth in zip(names, inexact, exact, strict=True):
        found[f"{name}_relative_difference"] = float((value - truth).norm() / truth.norm())
    return found


def compute(
    model: nn.Module, loss: nn.Module, image: Tensor, label: Tensor, precision: str
) -> list[Tensor]:
    """Logits, loss and gradients as float64."""
    with autocast(image.device.type, precision):
        outputs = model(image)
    total = loss(outputs, label).total
    gradients = torch.autograd.grad(total, list(model.parameters()))
    logits = outputs[0] if isinstance(outputs, list) else outputs
    flat = torch.cat([gradient.double().flatten() for gradient in gradients])
    return [logits.detach().double(), total.detach().double(), flat]


def hash_runs(context: Context, is_deterministic: bool) -> Figures:
    """Whether two equal runs, and a run that was stopped and continued, give the same weights."""
    phantom_store(context)
    name = "deterministic" if is_deterministic else "free"
    steps = context.choose(STEPS, 2)
    setting = f"train.deterministic={str(is_deterministic).lower()}"
    digests = []
    for number in (1, 2):
        run_dir = context.work / f"hash_{name}_{number}"
        train(context, run_dir, setting, f"train.max_steps={steps}")
        digests.append(digest_of(run_dir))
    resumed = context.work / f"hash_{name}_resumed"
    limit = f"train.max_steps={steps}"
    train(context, resumed, setting, limit, f"train.stop_at_step={steps // 2}")
    train(context, resumed, setting, limit, "train.stop_at_step=0")
    return {
        "steps": steps,
        "equal_runs_have_equal_bytes": digests[0] == digests[1],
        "resumed_run_has_equal_bytes": digests[0] == digest_of(resumed),
        "sha256": digests[0][:16],
    }


def train(context: Context, run_dir: Path, *overrides: str) -> None:
    run_command(
        "train", "--device", context.device.type, "--config", CONFIGS["S"],
        *common_overrides(context), f"run.dir={run_dir}", "validation.every_steps=0", *overrides,
    )  # fmt: skip


def digest_of(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "model.safetensors").read_bytes()).hexdigest()
