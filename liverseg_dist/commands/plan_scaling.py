"""`liverseg plan --scale`: efficiency on many GPUs, predicted from the time of a step on one GPU."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from liverseg_dist.config import Settings
from liverseg_dist.console import write_lines
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.errors import UserError
from liverseg_dist.planning.memory_estimate import trace_micro_batch
from liverseg_dist.planning.memory_fit import resolve_model
from liverseg_dist.planning.scaling_model import MLPERF_U_NET3D, Machine, scaling_table
from liverseg_dist.tracking.terminal_table import print_table

# 72 is one of the published MLPerf sizes, which the table compares with.
GPUS = (1, 2, 4, 8, 16, 32, 64, 72, 128, 256, 512, 1024)
MESSAGE_BYTES = 25 << 20
"""Default bucket size of DDP."""


def predict_scaling(
    args: argparse.Namespace, settings: Settings, store: CaseStore
) -> dict[str, Any]:
    """Predict and print the efficiency on many GPUs, from the time of a step on one GPU."""
    step = trace_micro_batch(resolve_model(settings, store.spacing_mm))
    if args.step_seconds:
        compute, source = args.step_seconds, "given"
    elif args.run:
        compute, source = _read_step_time(args.run), f"median of {args.run}"
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
    # DDP sends gradients in buckets, each with its own latency. Below two buckets nothing overlaps
    # with computation.
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


def _read_step_time(folder: Path) -> float:
    """Return the last median step time in seconds that a run logged. Raises `UserError`."""
    file = folder / "metrics.jsonl"
    try:
        rows = [
            json.loads(line)
            for line in file.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: no metrics of a run ({error}); give --step-seconds") from None
    # The last value: the first steps are slower, because kernels are chosen and caches filled.
    values = [row["speed/step_s_median"] for row in rows if "speed/step_s_median" in row]
    if not values:
        raise UserError(f"{file}: contains no speed/step_s_median yet; give --step-seconds")
    return float(values[-1])


def _print_scale(
    rows: dict[str, list], published: dict[int, float], step: str, parameters: int
) -> None:
    write_lines(
        f"one GPU's step {step}; {parameters / 1e6:.1f} M parameters; "
        "the batch per GPU stays the same",
        "efficiency, % of perfect scaling "
        "(bandwidths, latency and spread are assumptions unless given):",
    )
    headings = ("GPUs", *rows, "MLPerf")
    lines = []
    for i, gpus in enumerate(GPUS):
        shown = f"{100 * published[gpus]:.1f}" if gpus in published else ""
        lines.append((str(gpus), *(f"{100 * p[i].efficiency:.1f}" for p in rows.values()), shown))
    print_table(headings, lines, right=headings)
    write_lines(
        "MLPerf: published U-Net3D figures on H100, 71.1, 65.1 and 62.7 samples/s per GPU "
        "at 8, 16 and 72 GPUs, over",
        "that at 8. Another network of this kind; there the batch per GPU shrinks as GPUs are "
        "added, here it does not.",
    )
