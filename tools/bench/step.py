"""CPU time and activation memory of a training step: this project, nnU-Net's PlainConvUNet, MONAI's DynUNet, equal topology.

  OMP_NUM_THREADS=1 python tools/bench/step.py [--patch 64 128 128] [--features 32] [--rounds 3]
  python tools/bench/step.py --device cuda --precision bf16 --compile          on a GPU: milliseconds and GiB of it

A step is forward, cross-entropy on the full-resolution output, backward, SGD; batch 1, fp32, one thread. Before the
timing, nnU-Net's weights are copied into this project's network (`ours`), and loss and gradients are compared: the
mathematics is equal. Each timing is a new process (a warm-up step, then timed ones); systems are interleaved, and the best
round counts. `memory`: peak of tensor bytes beyond parameters, gradients and optimizer state; `rss`: growth of the
process's peak resident memory beyond the model with its optimizer. Ratios are peer / ours. `liverseg train`
keeps freed memory on CPUs, and so does `ours`; `freed memory kept` and `given back` show the effect of that alone.
Each comparison prints one JSON line.
Needs: pip install '.[bench]' monai (remove the torchvision that nnunetv2 installs).
"""

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liverseg_dist.config import ModelConfig
from liverseg_dist.inference.malloc_settings import keep_freed_memory
from liverseg_dist.model import UNet, build_model
from liverseg_dist.model.memory_trace import LiveBytes
from liverseg_dist.model.topology import plan_pooling, resolve_topology
from liverseg_dist.streams import guard_output_streams

OURS = {
    "ours": {},
    "ours, freed memory given back": {"keep": False},
    "ours, channels last": {"channels_last": True},
    "ours, levels 0 and 1 recomputed": {"levels": (0, 1)},
    "ours, all levels recomputed": {"levels": range(6)},
}
KEPT = ", freed memory kept"
"""A peer helped by our switch of the C library's allocator (`keep_freed_memory`)."""
PEERS = (
    "nnU-Net PlainConvUNet",
    "MONAI DynUNet",
    "nnU-Net PlainConvUNet" + KEPT,
    "MONAI DynUNet" + KEPT,
)
TOLERANCE = 1e-9
"""Largest relative difference (2-norm) of loss and gradients between ours and nnU-Net's in float64."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--patch", type=int, nargs=3, default=(64, 128, 128), metavar=("Z", "Y", "X")
    )
    parser.add_argument(
        "--features", type=int, default=32, help="at full resolution (32); capped at 320"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="timed steps of each process")
    parser.add_argument("--systems", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--compile", action="store_true", help="torch.compile for all")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        print(json.dumps(one(args.one, args)))
        return
    print(json.dumps({"bench": "step", "case": "equal mathematics", **parity(args)}), flush=True)
    found: dict[str, dict[str, Any]] = {}
    for _ in range(args.rounds):
        for name in args.systems:
            done = subprocess.run(
                [sys.executable, *sys.argv, "--one", name],
                capture_output=True,
                text=True,
                check=True,
            )
            figures = json.loads(done.stdout.splitlines()[-1])
            best = found.setdefault(name, figures)
            found[name] = {key: min(value, best[key]) for key, value in figures.items()}
    report(found, args)


def report(found: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    case = f"{'x'.join(map(str, args.patch))}, {args.features} features, {args.device} {args.precision}"
    for ours in (name for name in found if name in OURS):
        for peer in (name for name in found if name in PEERS):
            ratios = {
                f"ratio_{key}": round(found[peer][key] / found[ours][key], 3) for key in found[ours]
            }
            line = {
                "bench": "step",
                "case": case,
                "system": ours,
                "vs": peer,
                "ratio": ratios["ratio_seconds"],
            }
            print(json.dumps({**line, **ratios}))
    print(f"\n{case}\n{'':34} {'seconds':>9} {'memory GiB':>11} {'rss GiB':>9}")
    for name, figures in found.items():
        print(
            f"{name:34} {figures['seconds']:9.3f} {figures['memory_gib']:11.3f} {figures['rss_gib']:9.3f}"
        )


# --- one system in a process of its own ---------------------------------------------------------------------------


def one(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step (CPU seconds of the process, or the GPU's), GiB of tensors, GiB of resident memory."""
    gpu = args.device == "cuda"
    options = OURS.get(name, {})
    if not gpu and (name.endswith(KEPT) or (name in OURS and options.get("keep", True))):
        keep_freed_memory()  # as `liverseg train` does
    torch.manual_seed(0)
    model = network(name, args).to(args.device).train()
    form = torch.channels_last_3d if options.get("channels_last") else torch.contiguous_format
    model.to(memory_format=form)
    if args.compile:
        model.compile()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.99, nesterov=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    image, label = (tensor.to(args.device) for tensor in sample(args))
    image = image.contiguous(memory_format=form)

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            output = model(image)
        full_resolution_loss(output, label).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    optimizer.step()  # makes its state
    before = peak_resident_gib(reset=True)
    step()
    rss = peak_resident_gib() - before
    with LiveBytes() as counter:
        step()
    seconds = timed(step, args.steps, gpu)
    memory = torch.cuda.max_memory_allocated() if gpu else counter.peak
    return {"seconds": seconds, "memory_gib": memory / 2**30, "rss_gib": rss}


def timed(step: Callable[[], None], steps: int, gpu: bool) -> float:
    spent = []
    for _ in range(steps):
        if gpu:
            torch.cuda.synchronize()
        started = time.perf_counter() if gpu else time.process_time()
        step()
        if gpu:
            torch.cuda.synchronize()
        spent.append((time.perf_counter() if gpu else time.process_time()) - started)
    return min(spent)


def peak_resident_gib(reset: bool = False) -> float:
    """Linux: of this process, since its start or the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


# --- the networks -------------------------------------------------------------------------------------------------


def topology(args: argparse.Namespace) -> ModelConfig:
    levels = len(plan_pooling(args.patch, (1.0, 1.0, 1.0), 6)[0])
    features = tuple(min(args.features * 2**level, 320) for level in range(levels))
    config = ModelConfig(features=features, blocks_per_level=2, deep_supervision=False)
    return resolve_topology(config, args.patch, (1.0, 1.0, 1.0))


def network(name: str, args: argparse.Namespace) -> nn.Module:
    config = topology(args)
    if name in OURS:
        ours = build_model(config)
        ours.set_checkpointing([n for n in OURS[name].get("levels", ()) if n < ours.num_levels])
        return ours
    assert config.features
    assert config.strides
    assert config.kernels
    if name.removesuffix(KEPT) == PEERS[0]:
        from dynamic_network_architectures.architectures.unet import (
            PlainConvUNet,  # seconds, so only where needed
        )

        return PlainConvUNet(
            1,
            len(config.features),
            config.features,
            nn.Conv3d,
            config.kernels,
            config.strides,
            n_conv_per_stage=2,
            num_classes=3,
            n_conv_per_stage_decoder=2,
            conv_bias=True,
            norm_op=nn.InstanceNorm3d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            deep_supervision=False,
        )
    warnings.simplefilter("ignore")
    from monai.networks.nets import DynUNet

    return DynUNet(
        3,
        1,
        3,
        kernel_size=config.kernels,
        strides=config.strides,
        upsample_kernel_size=config.strides[1:],
        filters=config.features,
        norm_name=("INSTANCE", {"affine": True}),
        deep_supervision=False,
    )


def sample(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 1, *args.patch, generator=generator)
    return image, torch.randint(0, 3, (1, *args.patch), generator=generator)


def full_resolution_loss(output: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(output.float(), label)


def parity(args: argparse.Namespace) -> dict[str, Any]:
    """nnU-Net's weights in ours, edges of at most 64 voxels: loss and gradients. Exits when they differ.

    In float64 they must agree to `TOLERANCE`; in float32 ours may be at most twice as far from that as nnU-Net's.
    """
    torch.manual_seed(0)
    ours, theirs = network("ours", args), network(PEERS[0], args)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias") and "norm" not in name and "seg" not in name:
                parameter.zero_()  # of convolutions; the norm behind takes them out, ours has none
        for mine, other in zip(weights(ours), weights(theirs), strict=True):
            mine.copy_(other)
    image, label = (tensor[..., :64, :64, :64] for tensor in sample(args))
    single = [gradients(model, image, label) for model in (ours, theirs)]
    exact = [gradients(model.double(), image.double(), label) for model in (ours, theirs)]
    found = {
        "float64_ours_against_peer": distance(exact[0], exact[1]),
        "float32_ours_against_float64": distance(single[0], exact[1]),
        "float32_peer_against_float64": distance(single[1], exact[1]),
    }
    same = found["float64_ours_against_peer"] < TOLERANCE
    if (
        not same
        or found["float32_ours_against_float64"] > 2 * found["float32_peer_against_float64"]
    ):
        sys.exit(f"not the same mathematics: {found}")
    return {"vs": PEERS[0], **found, "tolerance": TOLERANCE}


def gradients(model: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    """Loss and the gradients of `weights`, as one float64 vector."""
    output = model(image)
    loss = F.cross_entropy(output, label)
    found = torch.autograd.grad(loss, weights(model))
    return torch.cat([loss.detach().double().view(1), *(part.double().flatten() for part in found)])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def weights(model: Any) -> list[nn.Parameter]:
    """Convolution, norm and head parameters in the order of forward, without biases of normed convolutions."""
    found: list[Any] = []
    if not isinstance(model, UNet):
        decoder: Any = model.decoder
        blocks = [b for stage in model.encoder.stages for part in stage for b in part.convs]
        found += [p for b in blocks for p in (b.conv.weight, b.norm.weight, b.norm.bias)]
        for up, stage in zip(decoder.transpconvs, decoder.stages, strict=True):
            found.append(up.weight)
            found += [p for b in stage.convs for p in (b.conv.weight, b.norm.weight, b.norm.bias)]
        return [*found, decoder.seg_layers[-1].weight, decoder.seg_layers[-1].bias]
    found += [
        p
        for stage in model.encoder
        for b in stage
        for p in (b.conv.weight, b.norm.weight, b.norm.bias)
    ]
    for level in reversed(model.decoder):
        found.append(level.up.weight)
        found += [p for b in level.convs for p in (b.conv.weight, b.norm.weight, b.norm.bias)]
    return [*found, model.heads[0].weight, model.heads[0].bias]


if __name__ == "__main__":
    guard_output_streams()
    main()
