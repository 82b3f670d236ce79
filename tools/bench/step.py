"""CPU time and activation memory of a training step: this project, nnU-Net's PlainConvUNet, MONAI's DynUNet, equal topology.

  OMP_NUM_THREADS=1 python tools/bench/step.py [--patch 64 128 128] [--features 32] [--rounds 3]
  python tools/bench/step.py --device cuda --precision bf16 --steps 20 --rounds 1    on a GPU
  python tools/bench/step.py --device cuda --precision bf16 --steps 20 --rounds 1 --compile

A step is forward, cross-entropy on the full-resolution output, backward, SGD; batch 1, fp32, one
thread. Before the timing, nnU-Net's weights are copied into this project's network, and loss and
gradients are compared: the mathematics is equal. Each system is timed in a new process: warm-up
steps, then `--steps` timed ones, of which the median counts. Systems are interleaved; the best of
`--rounds` counts. `memory`: peak of tensor bytes beyond parameters, gradients and optimizer state;
`rss` (CPU): growth of the process's peak resident memory. Ratios are peer / ours.

All systems run with the same settings of the C library's allocator, because they change the time of
a CPU step by a third: by default all keep freed memory, as `liverseg train` makes its process do.
`--allocator default` gives the C library's own settings to all; `both` measures both.
On a GPU `cudnn.benchmark` is on, and `--compile` compiles every system.
Each comparison prints one JSON line.
Needs: pip install '.[bench]' monai (remove the torchvision that nnunetv2 installs).
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from typing import Any

import torch
import torch.nn.functional as F
from peer_networks import build_dynunet, build_plain_conv_unet
from step_timing import measure_peak_bytes, peak_resident_gib, time_calls
from torch import Tensor, nn

from liverseg_dist.config import ModelConfig
from liverseg_dist.inference.malloc_settings import keep_freed_memory
from liverseg_dist.model import UNet, build_model
from liverseg_dist.model.topology import plan_pooling, resolve_topology
from liverseg_dist.precision import autocast
from liverseg_dist.streams import guard_output_streams

OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, channels last": {"channels_last": True},
    "ours, levels 0 and 1 recomputed": {"levels": (0, 1)},
    "ours, all levels recomputed": {"levels": range(6)},
}
NNUNET, DYNUNET = "nnU-Net PlainConvUNet", "MONAI DynUNet"
PEERS = {NNUNET: "dynamic_network_architectures", DYNUNET: "monai"}
"""The package that each needs."""
ALLOCATORS = {"kept": ("freed memory kept",), "default": ("C library's default",)}
ALLOCATORS["both"] = ALLOCATORS["kept"] + ALLOCATORS["default"]
TOLERANCE = 1e-9
"""Largest relative difference (2-norm) of loss and gradients between ours and nnU-Net's in float64."""
FLOAT32_ROUNDING = 1e-6
"""Relative difference (2-norm) that float32 may have from float64 for the smallest networks."""
WARM_UP_STEPS = {"cpu": 1, "cuda": 5}
"""cudnn.benchmark and torch.compile choose kernels in the first steps."""


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    if args.one:
        print(json.dumps(measure_system(args.one, args)))
        return
    absent = [name for name, package in PEERS.items() if not importlib.util.find_spec(package)]
    if absent:
        print(f"not installed, omitted: {', '.join(absent)}", file=sys.stderr)
    if NNUNET not in absent:
        print(json.dumps({"bench": "step", "case": "equal mathematics", **parity(args)}))
    for allocator in ALLOCATORS[args.allocator] if args.device == "cpu" else ("",):
        names = [name for name in args.systems if name not in absent]
        report(time_systems(names, allocator, args), allocator, args)


def parse_arguments() -> argparse.Namespace:
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
    parser.add_argument("--precision", default="fp32", choices=("fp32", "tf32", "bf16"))
    parser.add_argument("--allocator", default="kept", choices=sorted(ALLOCATORS))
    parser.add_argument("--compile", action="store_true", help="torch.compile for all systems")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--keep-memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    return args


def time_systems(
    names: list[str], allocator: str, args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """The best round of each system; each round of a system is a process."""
    found: dict[str, dict[str, Any]] = {}
    for _ in range(args.rounds):
        for name in names:
            command = [sys.executable, *sys.argv, "--one", name]
            if allocator == ALLOCATORS["kept"][0]:
                command.append("--keep-memory")
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            best = found.setdefault(name, figures)
            found[name] = {key: min(value, best[key]) for key, value in figures.items()}
    return found


def report(found: dict[str, dict[str, Any]], allocator: str, args: argparse.Namespace) -> None:
    shape = "x".join(map(str, args.patch))
    words = [shape, f"{args.features} features", f"{args.device} {args.precision}"]
    if args.compile:
        words.append("compiled")
    if allocator:
        words.append(f"{allocator} by all")
    case = ", ".join(words)
    for ours in (name for name in found if name in OURS):
        for peer in (name for name in found if name in PEERS):
            line: dict[str, Any] = {"bench": "step", "case": case, "system": ours, "vs": peer}
            line["ratio"] = round(found[peer]["seconds"] / found[ours]["seconds"], 3)
            for key in found[ours]:
                line[f"ratio_{key}"] = round(found[peer][key] / max(found[ours][key], 1e-9), 3)
            print(json.dumps(line))
    print(f"\n{case}")
    print(f"{'':34} " + " ".join(f"{key:>12}" for key in next(iter(found.values()))))
    for name, figures in found.items():
        print(f"{name:34} " + " ".join(f"{value:12.3f}" for value in figures.values()))


# --- one system in a process of its own ---------------------------------------------------------


def measure_system(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step (CPU seconds of the process, or the GPU's), GiB of tensors; on a CPU also
    GiB of resident memory."""
    device = torch.device(args.device)
    if args.keep_memory:
        keep_freed_memory()
    set_arithmetic(args.precision)
    torch.manual_seed(0)
    model = build_network(name, args).to(device).train()
    is_channels_last = OURS.get(name, {}).get("channels_last", False)
    form = torch.channels_last_3d if is_channels_last else torch.contiguous_format
    model.to(memory_format=form)  # type: ignore[call-overload]
    if args.compile:
        model.compile(dynamic=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.99, nesterov=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    image, label = (tensor.to(device) for tensor in sample(args))
    image = image.contiguous(memory_format=form)

    def step() -> None:
        with autocast(args.device, args.precision):
            output = model(image)
        full_resolution_loss(output, label).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    optimizer.step()  # makes its state
    before = peak_resident_gib(reset=True)
    for _ in range(WARM_UP_STEPS[args.device]):
        step()
    rss = peak_resident_gib() - before
    # A compiled model would be compiled again under the counter, into another program.
    is_counted = device.type == "cuda" or not args.compile
    memory = measure_peak_bytes(step, device) / 2**30 if is_counted else float("nan")
    timing = time_calls(step, args.steps, device)
    found = {"seconds": timing.median_s, "memory_gib": memory}
    return found if device.type == "cuda" else {**found, "rss_gib": rss}


def set_arithmetic(precision: str) -> None:
    """The switches that training sets, for all systems: kernels chosen by time, TF32 by choice."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


# --- the networks -------------------------------------------------------------------------------


def topology(args: argparse.Namespace) -> ModelConfig:
    levels = len(plan_pooling(args.patch, (1.0, 1.0, 1.0), 6)[0])
    features = tuple(min(args.features * 2**level, 320) for level in range(levels))
    config = ModelConfig(features=features, blocks_per_level=2, deep_supervision=False)
    return resolve_topology(config, args.patch, (1.0, 1.0, 1.0))


def build_network(name: str, args: argparse.Namespace) -> nn.Module:
    config = topology(args)
    if name == NNUNET:
        return build_plain_conv_unet(config)
    if name == DYNUNET:
        return build_dynunet(config)
    ours = build_model(config)
    ours.set_checkpointing([n for n in OURS[name].get("levels", ()) if n < ours.num_levels])
    return ours


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
    ours, theirs = build_network("ours", args), build_network(NNUNET, args)
    copy_peer_weights(ours, theirs)
    image, label = (tensor[..., :64, :64, :64] for tensor in sample(args))
    single = [gradients(model, image, label) for model in (ours, theirs)]
    exact = [gradients(model.double(), image.double(), label) for model in (ours, theirs)]
    found = {
        "float64_ours_against_peer": distance(exact[0], exact[1]),
        "float32_ours_against_float64": distance(single[0], exact[1]),
        "float32_peer_against_float64": distance(single[1], exact[1]),
    }
    limit = max(2 * found["float32_peer_against_float64"], FLOAT32_ROUNDING)
    is_same = found["float64_ours_against_peer"] < TOLERANCE
    if not is_same or found["float32_ours_against_float64"] > limit:
        sys.exit(f"not the same mathematics: {found}")
    return {"vs": NNUNET, **found, "tolerance": TOLERANCE}


@torch.no_grad()
def copy_peer_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Give our network the weights of nnU-Net's, whose biases before a norm become 0."""
    for name, parameter in theirs.named_parameters():
        # The norm subtracts the bias of the convolution before it; ours has none.
        if name.endswith("bias") and "norm" not in name and "seg" not in name:
            parameter.zero_()
    for mine, other in zip(weights(ours), weights(theirs), strict=True):
        mine.copy_(other)


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
