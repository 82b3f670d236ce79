"""`liverseg plan SRC` for a raw data set: from its fingerprint to a config file with reasons."""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch

from liverseg_dist.config import Settings
from liverseg_dist.console import write_lines
from liverseg_dist.cores import usable_cores
from liverseg_dist.errors import UserError
from liverseg_dist.planning.cpu_plan import plan_for_cpu
from liverseg_dist.planning.experiment_memory import GpuBudget
from liverseg_dist.planning.experiment_plan import plan_experiment
from liverseg_dist.planning.experiment_rules import count_text
from liverseg_dist.planning.fingerprint import DatasetFingerprint
from liverseg_dist.planning.fingerprint_read import describe_left_out, read_fingerprint
from liverseg_dist.planning.memory_estimate import GIB
from liverseg_dist.planning.plan_file import write_plan
from liverseg_dist.planning.plan_settings import ExperimentPlan, list_given
from liverseg_dist.texts.paths import quote_path
from liverseg_dist.tracking.terminal_table import print_table

log = logging.getLogger(__name__)
DEFAULT_GIB = 24.0
"""A common GPU for training, where none is found and none is named."""


def plan_dataset(args: argparse.Namespace, settings: Settings, source: Path) -> dict[str, Any]:
    """Plan a training on a raw data set, print the decisions and write them to `--out`.

    Args:
        args: Options of `liverseg plan`.
        settings: Given settings, which the plan keeps.
        source: The data set.

    Raises:
        UserError: An option is wrong, or nothing fits into the memory.
        RunFailed: Too few scans can be read.
    """
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: must be 0 (one per core) or more")
    cores = usable_cores()
    fingerprint = read_fingerprint(
        source, args.workers or cores, _fingerprint_file(args), settings.convert
    )
    if line := describe_left_out(fingerprint):
        log.warning(line)
    for note in fingerprint.notes:
        log.warning(note)
    # Settings that the user gave are kept as they are; the plan chooses the others around them.
    given = list_given(settings)
    if args.cpu_minutes is not None:
        plan = plan_for_cpu(fingerprint, args.cpu_minutes, cores, given)
        target = f"{args.cpu_minutes:g} minutes on {count_text(cores, 'CPU core')}"
    else:
        budget = _find_budget(args, settings)
        plan = plan_experiment(fingerprint, budget, given)
        target = f"{count_text(budget.devices, 'device')} of {budget.memory_gib:g} GiB"
    title = _title_lines(fingerprint, target)
    if args.out:
        write_plan(args.out, plan.decisions, title)
    _print_plan(plan, title)
    if args.out:
        _print_next_steps(source, args.out)
    return {
        "source": str(source),
        "out": str(args.out) if args.out else None,
        **plan.summary,
        "decisions": [decision.to_json() for decision in plan.decisions],
    }


def _fingerprint_file(args: argparse.Namespace) -> Path | None:
    """Return the file that keeps the measurements: as given, or beside `--out`."""
    if args.fingerprint is not None:
        return Path(args.fingerprint)
    return args.out.with_suffix(".fingerprint.json") if args.out else None


def _find_budget(args: argparse.Namespace, settings: Settings) -> GpuBudget:
    """Return the devices to plan for: as given, else those of this machine, else a default."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gib = args.gpu_memory or settings.memory.budget_gib
    if gib is None and found:
        sizes = [torch.cuda.get_device_properties(n).total_memory for n in range(found)]
        # The smallest GPU decides: all ranks have the same settings.
        gib = round(min(sizes) / GIB, 2)
    if gib is None:
        gib = DEFAULT_GIB
        log.warning("no GPU found: planning for %g GiB; --gpu-memory-gib states another size", gib)
    devices = args.gpus or max(1, found)
    # bf16 needs no loss scaling, and every GPU since 2020 has it.
    precision = "bf16"
    if "precision" in settings.train.model_fields_set:
        precision = settings.train.precision
    # Emulated bf16 is slower than fp32, so it does not count as support.
    elif found and not torch.cuda.is_bf16_supported(including_emulation=False):
        precision = "fp16"
    return GpuBudget(float(gib), devices, precision)


def _title_lines(fingerprint: DatasetFingerprint, target: str) -> list[str]:
    structures = [structure.name for structure in fingerprint.scheme.structures]
    shown = ", ".join(structures[:6]) + (", ..." if len(structures) > 6 else "")
    lesions = len(fingerprint.lesion_diameters_mm)
    return [
        f"Written by `liverseg plan` for {target}; each comment states why.",
        f"Data: {fingerprint.name}, {count_text(len(fingerprint.cases), 'labelled scan')}, "
        f"{', '.join(channel.name for channel in fingerprint.channels)}; "
        f"{count_text(len(structures), 'structure')}: {shown}; {count_text(lesions, 'lesion')}",
    ]


def _print_plan(plan: ExperimentPlan, title: list[str]) -> None:
    write_lines(title[1])
    rows = []
    for decision in plan.decisions:
        # One form for terminal and file: JSON of a list is YAML as well.
        value = decision.value
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        rows.append((decision.key, text, decision.reason))
    print_table(("setting", "value", "reason"), rows)
    if "need_gib" in plan.summary:
        write_lines(
            "",
            f"memory of a device: {plan.summary['need_gib']:.2f} of "
            f"{plan.summary['gpu_memory_gib']:g} GiB; computed from tensor shapes, the margin for "
            "workspaces and gaps is assumed",
        )


def _print_next_steps(source: Path, out: Path) -> None:
    config = quote_path(out)
    write_lines(
        "",
        f"written: {out}; next:",
        f"  liverseg convert {quote_path(source)} store.zarr --config {config}",
        f"  liverseg train --config {config} data.store=store.zarr run.dir=runs/first",
    )
