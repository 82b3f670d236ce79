"""Plan a training: from a raw data set to a config file, or from a store to what fits a GPU.

A folder of scans (dataset.json or imagesTr/): voxel size, slabs, patch, network, batch,
normalisation, sampling and steps, each with the reason, by the rules of nnU-Net where they suit
slabs of 64 slices. No GPU is needed.

  liverseg plan Task03_Liver --out plan.yaml             for the GPUs found, else for 24 GiB
  liverseg plan SRC --out plan.yaml --gpu-memory-gib 80 --devices 8
  liverseg plan SRC --out plan.yaml --cpu-minutes 30     a short training without a GPU
  liverseg plan SRC --out plan.yaml model.preset=S       a setting that is given is kept
  liverseg convert SRC store.zarr --config plan.yaml     then: liverseg train --config plan.yaml ...

A store (the output of liverseg convert): find settings that fit a GPU.

  liverseg plan store.zarr --gpu-memory 24                          patch, micro-batch, checkpointing, strategy
  liverseg plan store.zarr --gpu-memory 80 --gpus 8 model.preset=L train.precision=bf16 train.global_batch_size=16
  liverseg plan store.zarr --gpu-memory 24 data.patch_size=[64,192,192]     does this patch fit?
  liverseg plan store.zarr --gpu-memory 24 --out fits.yaml          then: liverseg train --config fits.yaml ...
  liverseg plan store.zarr --scale --step-seconds 0.35              efficiency on 1 to 1024 GPUs
  liverseg plan store.zarr --scale --run runs/first                 with the step time that a run measured

Memory of a rank = weights + gradients + optimizer state + exchange buffers (by strategy) + activations + margin.
The activations are counted in the real training step with tensors that have a shape but no memory. The inputs of
convolutions are recomputed in backward anyway, so checkpointing of whole levels saves about a fifth more. The margin
is for the CUDA context, library workspaces and fragmentation. It is an assumption (memory.margin_gib), as is every
bandwidth of --scale. With torch.compile the compiler decides what is kept: check memory/gpu_gib in the first steps.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from liverseg_dist.commands.options import add_settings, settings_from
from liverseg_dist.commands.plan_dataset import plan_dataset
from liverseg_dist.commands.plan_scaling import predict_scaling
from liverseg_dist.config import Settings
from liverseg_dist.console import write_lines
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.errors import UserError, printable
from liverseg_dist.planning.fingerprint_read import is_dataset_folder
from liverseg_dist.planning.memory_estimate import estimate_memory
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
from liverseg_dist.planning.scaling_model import Machine
from liverseg_dist.texts.paths import path_argument, quote_path, text_argument
from liverseg_dist.tracking.terminal_table import print_table
from liverseg_dist.volume import Float3, Index3

# The largest case that a store can have: the last lines state what training on whole slabs would
# need.
SLAB: Index3 = (64, 512, 512)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "store",
        type=text_argument,
        metavar="SRC|STORE",
        help="folder of scans with dataset.json or imagesTr/, or a Zarr store",
    )
    parser.add_argument(
        "--gpu-memory-gib",
        "--gpu-memory",
        dest="gpu_memory",
        type=float,
        metavar="GIB",
        help="memory of one GPU in GiB (default: memory.budget_gib; then, for a data set, that "
        "of the GPU found; else 24)",
    )
    parser.add_argument(
        "--devices",
        "--gpus",
        dest="gpus",
        type=int,
        metavar="N",
        help="number of ranks with one GPU each (default: 1; for a data set the GPUs found)",
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="FILE",
        help="write the settings as a YAML file for --config",
    )
    _add_dataset_options(parser)
    _add_scale_options(parser)
    add_settings(parser)


def _add_dataset_options(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("for a data set")
    data.add_argument(
        "--cpu-minutes",
        type=float,
        metavar="M",
        help="plan for the CPU cores of this machine and this time, instead of GPUs",
    )
    data.add_argument(
        "--fingerprint",
        type=path_argument,
        metavar="FILE",
        help="file that keeps what was measured, so that unchanged scans are not read again "
        "(default: NAME.fingerprint.json beside --out; without --out nothing is kept)",
    )
    data.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that read scans (default: one per core)",
    )


def _add_scale_options(parser: argparse.ArgumentParser) -> None:
    machine = Machine()
    scale = parser.add_argument_group("time on many GPUs")
    scale.add_argument(
        "--scale", action="store_true", help="predict the efficiency on 1 to 1024 GPUs"
    )
    scale.add_argument(
        "--step-seconds", type=float, metavar="S", help="measured time of a step on one GPU"
    )
    scale.add_argument(
        "--run",
        type=path_argument,
        metavar="RUN",
        help="read the time of a step from metrics.jsonl of this run",
    )
    scale.add_argument(
        "--tflops",
        type=float,
        default=40.0,
        metavar="T",
        help="without a measured time: speed in TFLOP/s (default: 40)",
    )
    scale.add_argument(
        "--gpus-per-node", type=int, default=machine.gpus_per_node, metavar="N", help="default: 8"
    )
    scale.add_argument(
        "--intra-gb-s",
        type=float,
        default=machine.intra_gb_s,
        metavar="G",
        help="bandwidth within a node, GB/s (default: 300)",
    )
    scale.add_argument(
        "--inter-gb-s",
        type=float,
        default=machine.inter_gb_s,
        metavar="G",
        help="network bandwidth of a node, GB/s (default: 50)",
    )
    scale.add_argument(
        "--latency-us",
        type=float,
        default=machine.inter_latency_us,
        metavar="U",
        help="latency of one hop, microseconds (default: 15)",
    )
    scale.add_argument(
        "--spread-pct",
        type=float,
        default=100 * machine.spread,
        metavar="P",
        help="spread of step times, %% (default: 1)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_from(args)
    _check_numbers(args)
    source = Path(args.store) if "://" not in args.store else None
    if source is not None and is_dataset_folder(source):
        if args.scale:
            raise UserError(f"--scale: needs a store; {printable(args.store)} is a raw data set")
        return plan_dataset(args, settings, source)
    _refuse_dataset_options(args)
    args.gpus = args.gpus or 1
    # Each rank must have a sample in every step, otherwise it would wait for the others with
    # nothing to do.
    if args.gpus > settings.train.global_batch_size:
        raise UserError(
            f"--gpus {args.gpus}: train.global_batch_size = {settings.train.global_batch_size} "
            f"leaves some ranks without a sample; add train.global_batch_size={args.gpus}"
        )
    store = CaseStore.open(args.store)
    if args.scale:
        return predict_scaling(args, settings, store)
    return _plan_memory(args, settings, store)


def _check_numbers(args: argparse.Namespace) -> None:
    for name in (
        "gpu_memory",
        "step_seconds",
        "tflops",
        "gpus",
        "gpus_per_node",
        "intra_gb_s",
        "inter_gb_s",
        "cpu_minutes",
    ):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: must be above 0")


def _refuse_dataset_options(args: argparse.Namespace) -> None:
    """Raise `UserError` for an option that has no effect on a store."""
    for name in ("cpu_minutes", "fingerprint"):
        if getattr(args, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')}: only for a folder of scans (dataset.json or "
                f"imagesTr/), which {printable(args.store)} is not"
            )


def _plan_memory(args: argparse.Namespace, settings: Settings, store: CaseStore) -> dict[str, Any]:
    budget = args.gpu_memory or settings.memory.budget_gib or 24.0
    # The median shape limits the patch: larger ones would be padding in half of the cases.
    largest = _median_shape(store)
    options = _list_options(settings, store.spacing_mm, budget, args.gpus, largest)
    best = best_option(options, store.spacing_mm, budget)
    if best is None:
        least = min(options, key=lambda o: o.estimate.gib)
        patch = "x".join(map(str, least.patch_size))
        raise UserError(
            f"--gpu-memory {budget:g}: one sample of {patch} with levels "
            f"{list(least.estimate.levels)} recomputed needs {least.estimate.gib:.2f} GiB "
            f"({least.estimate.describe_parts()}); "
            "use a smaller model.preset, or train.precision=bf16"
        )
    chosen = _complete_settings(settings, best, store.spacing_mm, budget, args.gpus)
    exact = estimate_memory(chosen, args.gpus, levels=chosen.train.activation_checkpointing)  # type: ignore[arg-type]
    slab = settings.model_copy(
        update={"train": chosen.train.model_copy(update={"micro_batch_size": 1})}
    )
    slab = resolve_model(replace_settings(slab, patch=SLAB), store.spacing_mm)
    found = {
        "budget_gib": budget,
        "ranks": args.gpus,
        "settings": _list_overrides(chosen, budget),
        "need_gib": round(exact.gib, 3),
        "parts_gib": {name: round(size / 2**30, 4) for name, size in exact.parts.items()},
        "tflop_per_micro_batch": round(exact.flops / 1e12, 3),
        "patches": [_describe_option(o, budget) for o in options],
        "strategies_gib": {
            name: round(n.gib, 3) for name, n in estimate_strategies(chosen, args.gpus).items()
        },
        "whole_slab": {
            "patch_size": list(SLAB),
            "bf16_gib": round(estimate_memory(_with_precision(slab, "bf16"), args.gpus).gib, 2),
            "fp32_gib": round(estimate_memory(_with_precision(slab, "fp32"), args.gpus).gib, 2),
        },
        "measured": "tensor shapes are exact; margin assumed; no GPU was used",
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            yaml.safe_dump(_nest_keys(found["settings"]), sort_keys=False), encoding="utf-8"
        )
    _print_memory(found, exact.describe_parts(), chosen, args)
    return found


def _median_shape(store: CaseStore) -> Index3:
    """Median shape (z, y, x) of the cases, so that one unusual case does not determine the patch."""
    shapes = np.array([store.meta(case_id).grid.shape for case_id in store.case_ids])
    z, y, x = (int(edge) for edge in np.median(shapes, axis=0))
    return z, y, x


def _list_options(
    settings: Settings, spacing_mm: Float3, budget: float, ranks: int, largest: Index3
) -> list[PatchOption]:
    given = "patch_size" in settings.data.model_fields_set
    wanted = [settings.data.patch_size] if given else candidate_patches(largest)
    options = []
    for patch in wanted:
        try:
            options.append(plan_patch(settings, patch, spacing_mm, budget, ranks))
        except UserError:
            # A patch that the network cannot take is left out of the list, unless the user asked
            # for it.
            if given:
                raise
    if not options:
        raise UserError(
            f"no patch within {largest} voxels suits this network; give data.patch_size=[z,y,x]"
        )
    return options


def _complete_settings(
    settings: Settings, best: PatchOption, spacing_mm: Float3, budget: float, ranks: int
) -> Settings:
    """Fill in the topology, and recompute as few levels as the budget allows."""
    chosen = resolve_model(
        replace_settings(settings, patch=best.patch_size, micro=best.micro_batch), spacing_mm
    )
    # A larger patch is worth more than a few levels that are recomputed, so the patch is chosen
    # first.
    auto = chosen.train.model_copy(update={"activation_checkpointing": "auto"})
    least = resolve_checkpointing(chosen.model_copy(update={"train": auto}), budget, ranks, "cuda")
    return replace_settings(chosen, levels=least.levels)


def _with_precision(settings: Settings, precision: str) -> Settings:
    return settings.model_copy(
        update={"train": settings.train.model_copy(update={"precision": precision})}
    )


def _list_overrides(chosen: Settings, budget: float) -> dict[str, Any]:
    train = chosen.train
    keys: dict[str, Any] = {
        "data.patch_size": list(chosen.data.patch_size),
        "model.preset": chosen.model.preset,
        "train.global_batch_size": train.global_batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        # The empty list would mean "default" in the config file.
        "train.activation_checkpointing": list(train.activation_checkpointing) or "none",
        "train.strategy": train.strategy,
        "train.precision": train.precision,
        "memory.budget_gib": budget,
    }
    if train.strategy == "deepspeed":
        keys["train.zero_stage"] = train.zero_stage
    return keys


def _nest_keys(keys: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in keys.items():
        section, name = key.split(".")
        found.setdefault(section, {})[name] = value
    return found


def _describe_option(o: PatchOption, budget: float) -> dict[str, Any]:
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
    strategies = ", ".join(f"{name} {gib:.2f}" for name, gib in found["strategies_gib"].items())
    slab = found["whole_slab"]
    lines = [
        "",
        f"fits {found['budget_gib']:g} GiB with {found['need_gib']:.2f}: {why} GiB",
        "chosen: the largest patch up to the width of a liver without recomputation, "
        "else the largest that fits;",
        f"per strategy on {args.gpus} GPUs: {strategies}",
        f"a whole slab 64x512x512, one sample: {slab['bf16_gib']} GiB in bf16, "
        f"{slab['fp32_gib']} in fp32",
        "(computed from tensor shapes, no GPU was used; margin for workspaces and gaps assumed)",
        "",
    ]
    if args.out:
        lines.append(f"written: {args.out}; use it with --config {quote_path(args.out)}")
    overrides = [f"{key}={_format_value(value)}" for key, value in found["settings"].items()]
    # The last line alone can be copied behind `liverseg train`.
    write_lines(*lines, " ".join(overrides))


def _format_value(value: Any) -> str:
    # No spaces, so that a shell passes the list as one argument.
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list) else f"{value}"
