"""Tell which settings fit a GPU, and why; no GPU is needed here.

  liverseg plan store.zarr --gpu-memory 24                          patch, micro-batch, checkpointing, strategy
  liverseg plan store.zarr --gpu-memory 80 --gpus 8 model.preset=L train.precision=bf16 train.global_batch_size=16
  liverseg plan store.zarr --gpu-memory 24 data.patch_size=[64,192,192]     does this patch fit?
  liverseg plan store.zarr --gpu-memory 24 --out fits.yaml          then: liverseg train --config fits.yaml ...
  liverseg plan store.zarr --scale --step-seconds 0.35              efficiency on 1 to 1024 GPUs
  liverseg plan store.zarr --scale --run runs/first                 with the step time that a run measured

Memory of a rank = weights + gradients + optimizer state + exchange buffers (each by strategy) + activations + margin.
The activations are found by walking through the real step with tensors that have no memory; the convolutions' inputs
are rebuilt in backward anyway, so recomputing whole levels (checkpointing) saves about a fifth more. The margin is for
CUDA's context, library workspaces and the allocator's gaps: an assumption (memory.margin_gib), as is every bandwidth
of --scale. With torch.compile the compiler decides what is kept: watch memory/gpu_gib of the first steps.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from liverseg_dist.commands.options import add_settings, settings_from
from liverseg_dist.config import Settings
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.errors import UserError
from liverseg_dist.planning.memory_estimate import estimate_memory, trace_micro_batch
from liverseg_dist.planning.memory_fit import (
    PatchOption,
    best_option,
    candidate_patches,
    estimate_strategies,
    plan_patch,
    replace_settings,
    resolve_checkpointing,
    resolve_model,
)
from liverseg_dist.planning.scaling_model import MLPERF_U_NET3D, Machine, scaling_table
from liverseg_dist.texts.paths import path_argument, quote_path, text_argument
from liverseg_dist.tracking.terminal_table import print_table
from liverseg_dist.volume import Float3, Index3

SLAB: Index3 = (64, 512, 512)
GPUS = (1, 2, 4, 8, 16, 32, 64, 72, 128, 256, 512, 1024)
MESSAGE_BYTES = 25 << 20
"""DDP's bucket."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    machine = Machine()
    parser.add_argument(
        "store",
        type=text_argument,
        metavar="STORE",
        help="the Zarr store to train on: its voxel size shapes the network",
    )
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="of one GPU, in GiB (default: 24)"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="ranks, one GPU each (1)")
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="FILE",
        help="write the settings that fit as YAML, for --config",
    )
    scale = parser.add_argument_group("time on many GPUs")
    scale.add_argument("--scale", action="store_true", help="predict efficiency for 1 to 1024 GPUs")
    scale.add_argument(
        "--step-seconds", type=float, metavar="S", help="a step on one GPU, as measured"
    )
    scale.add_argument(
        "--run", type=path_argument, metavar="RUN", help="take it from this run's metrics.jsonl"
    )
    scale.add_argument(
        "--tflops", type=float, default=40.0, metavar="T", help="else: speed reached, TFLOP/s (40)"
    )
    scale.add_argument(
        "--gpus-per-node", type=int, default=machine.gpus_per_node, metavar="N", help="(8)"
    )
    scale.add_argument(
        "--intra-gb-s", type=float, default=machine.intra_gb_s, metavar="G", help="in a node (300)"
    )
    scale.add_argument(
        "--inter-gb-s",
        type=float,
        default=machine.inter_gb_s,
        metavar="G",
        help="a node's network (50)",
    )
    scale.add_argument(
        "--latency-us", type=float, default=machine.inter_latency_us, metavar="U", help="a hop (15)"
    )
    scale.add_argument(
        "--spread-pct",
        type=float,
        default=100 * machine.spread,
        metavar="P",
        help="of step times (1)",
    )
    add_settings(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_from(args)
    for name in (
        "gpu_memory",
        "step_seconds",
        "tflops",
        "gpus",
        "gpus_per_node",
        "intra_gb_s",
        "inter_gb_s",
    ):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: must be above 0")
    if args.gpus > settings.train.global_batch_size:
        raise UserError(
            f"--gpus {args.gpus}: train.global_batch_size = {settings.train.global_batch_size} leaves some without a "
            f"sample; add train.global_batch_size={args.gpus}"
        )
    store = CaseStore.open(args.store)
    return _scale(args, settings, store) if args.scale else _memory(args, settings, store)


# --- memory -------------------------------------------------------------------------------------------------------


def _memory(args: argparse.Namespace, settings: Settings, store: CaseStore) -> dict[str, Any]:
    budget = args.gpu_memory or settings.memory.budget_gib or 24.0
    largest = _largest_case(store)
    options = _options(settings, store.spacing_mm, budget, args.gpus, largest)
    best = best_option(options, store.spacing_mm, budget)
    if best is None:
        least = min(options, key=lambda o: o.estimate.gib)
        patch = "x".join(map(str, least.patch_size))
        raise UserError(
            f"--gpu-memory {budget:g}: one sample of {patch} with levels "
            f"{list(least.estimate.levels)} recomputed needs {least.estimate.gib:.2f} GiB "
            f"({least.estimate.describe_parts()}); "
            "take a smaller model.preset, or train.precision=bf16"
        )
    chosen = _chosen(settings, best, store.spacing_mm, budget, args.gpus)
    exact = estimate_memory(chosen, args.gpus, levels=chosen.train.activation_checkpointing)  # type: ignore[arg-type]
    slab = settings.model_copy(
        update={"train": chosen.train.model_copy(update={"micro_batch_size": 1})}
    )
    slab = resolve_model(replace_settings(slab, patch=SLAB), store.spacing_mm)
    found = {
        "budget_gib": budget,
        "ranks": args.gpus,
        "settings": _overrides(chosen, budget),
        "need_gib": round(exact.gib, 3),
        "parts_gib": {name: round(size / 2**30, 4) for name, size in exact.parts.items()},
        "tflop_per_micro_batch": round(exact.flops / 1e12, 3),
        "patches": [_row(o, budget) for o in options],
        "strategies_gib": {
            name: round(n.gib, 3) for name, n in estimate_strategies(chosen, args.gpus).items()
        },
        "whole_slab": {
            "patch_size": list(SLAB),
            "bf16_gib": round(estimate_memory(_precision(slab, "bf16"), args.gpus).gib, 2),
            "fp32_gib": round(estimate_memory(_precision(slab, "fp32"), args.gpus).gib, 2),
        },
        "measured": "tensor shapes are exact; margin assumed; no GPU was used",
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            yaml.safe_dump(_nested(found["settings"]), sort_keys=False), encoding="utf-8"
        )
    _print_memory(found, exact.describe_parts(), chosen, args)
    return found


def _largest_case(store: CaseStore) -> Index3:
    """Median over the cases of each stored edge, so that a patch is not made for one odd case."""
    shapes = np.array([store.meta(case_id).grid.shape for case_id in store.case_ids])
    z, y, x = (int(edge) for edge in np.median(shapes, axis=0))
    return z, y, x


def _options(
    settings: Settings, spacing_mm: Float3, budget: float, ranks: int, largest: Index3
) -> list[PatchOption]:
    given = "patch_size" in settings.data.model_fields_set
    wanted = [settings.data.patch_size] if given else candidate_patches(largest)
    options = []
    for patch in wanted:
        try:
            options.append(plan_patch(settings, patch, spacing_mm, budget, ranks))
        except UserError:
            if given:
                raise
    if not options:
        raise UserError(
            f"no patch within {largest} voxels suits this network; name one, data.patch_size=[z,y,x]"
        )
    return options


def _chosen(
    settings: Settings, best: PatchOption, spacing_mm: Float3, budget: float, ranks: int
) -> Settings:
    """The settings of an option, with the fewest levels recomputed and the topology filled in."""
    chosen = resolve_model(
        replace_settings(settings, patch=best.patch_size, micro=best.micro_batch), spacing_mm
    )
    auto = chosen.train.model_copy(update={"activation_checkpointing": "auto"})
    least = resolve_checkpointing(chosen.model_copy(update={"train": auto}), budget, ranks, "cuda")
    return replace_settings(chosen, levels=least.levels)


def _precision(settings: Settings, precision: str) -> Settings:
    return settings.model_copy(
        update={"train": settings.train.model_copy(update={"precision": precision})}
    )


def _overrides(chosen: Settings, budget: float) -> dict[str, Any]:
    train = chosen.train
    keys: dict[str, Any] = {
        "data.patch_size": list(chosen.data.patch_size),
        "model.preset": chosen.model.preset,
        "train.global_batch_size": train.global_batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        "train.activation_checkpointing": list(train.activation_checkpointing) or "none",
        "train.strategy": train.strategy,
        "train.precision": train.precision,
        "memory.budget_gib": budget,
    }
    if train.strategy == "deepspeed":
        keys["train.zero_stage"] = train.zero_stage
    return keys


def _nested(keys: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in keys.items():
        section, name = key.split(".")
        found.setdefault(section, {})[name] = value
    return found


def _row(o: PatchOption, budget: float) -> dict[str, Any]:
    return {
        "patch_size": list(o.patch_size),
        "one_sample_gib": round(o.one_sample.gib, 3),
        "micro_batch_size": o.micro_batch,
        "levels_recomputed": list(o.estimate.levels),
        "need_gib": round(o.estimate.gib, 3),
        "fits": o.estimate.gib <= budget,
        "tflop_per_sample": round(o.one_sample.flops / 1e12, 3),
    }


def _print_memory(
    found: dict[str, Any], why: str, chosen: Settings, args: argparse.Namespace
) -> None:
    headings = ("patch", "1 sample", "micro-batch", "GiB", "TFLOP a sample", "recomputed levels")
    rows = []
    for row in found["patches"]:
        mark = " <-" if row["patch_size"] == list(chosen.data.patch_size) else ""
        rows.append((
            "x".join(map(str, row["patch_size"])),
            f"{row['one_sample_gib']:.2f}",
            str(row["micro_batch_size"] or "none fits"),
            f"{row['need_gib']:.2f}",
            f"{row['tflop_per_sample']:.2f}",
            f"{row['levels_recomputed'] or 'none'}{mark}",
        ))  # fmt: skip
    print_table(headings, rows, right=headings[:5])
    print(f"\nfits {found['budget_gib']:g} GiB with {found['need_gib']:.2f}: {why} GiB")
    print(
        "the largest patch up to a liver's width that needs no recomputation, else the largest that fits;"
    )
    print(
        f"per strategy on {args.gpus} GPUs: "
        + ", ".join(f"{k} {v:.2f}" for k, v in found["strategies_gib"].items())
    )
    slab = found["whole_slab"]
    print(
        f"a whole slab 64x512x512, one sample: {slab['bf16_gib']} GiB in bf16, {slab['fp32_gib']} in fp32"
    )
    print(
        "(computed from tensor shapes, no GPU was used; margin for workspaces and gaps assumed)\n"
    )
    if args.out:
        print(f"written: {args.out}; use it with --config {quote_path(args.out)}")
    print(" ".join(f"{key}={_text(value)}" for key, value in found["settings"].items()))


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list) else f"{value}"


# --- time ---------------------------------------------------------------------------------------------------------


def _scale(args: argparse.Namespace, settings: Settings, store: CaseStore) -> dict[str, Any]:
    step = trace_micro_batch(resolve_model(settings, store.spacing_mm))
    if args.step_seconds:
        compute, source = args.step_seconds, "given"
    elif args.run:
        compute, source = _measured(args.run), f"median of {args.run}"
    else:
        compute = step.flops / (args.tflops * 1e12)
        source = f"assumed: {step.flops / 1e12:.2f} TFLOP at {args.tflops:g} TFLOP/s; better --step-seconds or --run"
    machine = Machine(
        args.gpus_per_node,
        args.intra_gb_s,
        args.inter_gb_s,
        inter_latency_us=args.latency_us,
        spread=args.spread_pct / 100,
    )
    groups = max(2, round(4 * step.parameters / MESSAGE_BYTES))
    rows = scaling_table(compute, step.parameters, groups, machine, GPUS)
    published = {n: value / MLPERF_U_NET3D[8] for n, value in MLPERF_U_NET3D.items()}
    _print_scale(rows, published, f"{compute:.4g} s ({source})", step.parameters)
    return {
        "step_s": compute,
        "step_from": source,
        "parameters": step.parameters,
        "machine": asdict(machine),
        "strategies": {
            name: [asdict(p) for p in predictions] for name, predictions in rows.items()
        },
        "mlperf_unet3d_samples_per_s_per_h100": MLPERF_U_NET3D,
        "mlperf_unet3d_against_8": {n: round(v, 3) for n, v in published.items()},
    }


def _measured(folder: Path) -> float:
    """The last median step time that a run logged."""
    file = folder / "metrics.jsonl"
    try:
        rows = [
            json.loads(line)
            for line in file.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: no metrics of a run ({error}); give --step-seconds") from None
    values = [row["speed/step_s_median"] for row in rows if "speed/step_s_median" in row]
    if not values:
        raise UserError(f"{file}: holds no speed/step_s_median yet; give --step-seconds")
    return float(values[-1])


def _print_scale(
    rows: dict[str, list], published: dict[int, float], step: str, parameters: int
) -> None:
    print(
        f"one GPU's step {step}; {parameters / 1e6:.1f} M parameters; the batch per GPU stays the same"
    )
    print(
        "efficiency, % of perfect scaling (bandwidths, latency and spread are assumptions unless you gave them):"
    )
    headings = ("GPUs", *rows, "MLPerf")
    lines = []
    for i, gpus in enumerate(GPUS):
        shown = f"{100 * published[gpus]:.1f}" if gpus in published else ""
        lines.append((str(gpus), *(f"{100 * p[i].efficiency:.1f}" for p in rows.values()), shown))
    print_table(headings, lines, right=headings)
    print(
        "MLPerf: published U-Net3D figures on H100, 71.1, 65.1 and 62.7 samples/s per GPU at 8, 16 and 72 GPUs, over"
    )
    print(
        "that at 8. Another network of this kind; there the batch per GPU shrinks as GPUs are added, here it does not."
    )
