"""Which options of `launch` each command accepts, and the resources that the options request.

An option that a command would ignore is refused. A job that runs with other resources than
requested costs more than a second submission.
"""

import argparse
from typing import Any

from liverseg_dist.errors import UserError

from .launch_options import DEFAULT_CPUS, DEFAULT_TIME, DEFAULT_TIME_OTHERS
from .option_values import parse_resource
from .sbatch import Resources
from .sbatch_options import Option, format_option, parse_plugin_option, parse_sbatch_option
from .units import parse_time_limit, time_to_seconds

GPU_COMMANDS = (
    "train",
    "tune",
    "evaluate",
    "predict",
    "postprocess",
    "convert",
    "denoiser",
    "demo",
    "doctor",
    "chain",
)
TRAINING_COMMANDS = ("train", "tune", "chain")
"""Commands for which a job without GPUs is most likely a mistake."""

SLURM_ONLY = (
    "partition",
    "account",
    "qos",
    "constraint",
    "mem",
    "mem_gib",
    "sbatch",
    "sbatch_plugin",
    "after",
    "parsable",
    "cpu_bind",
    "gpu_bind",
    "distribution",
    "cpu_partition",
    "convert_sbatch",
    "stage_option",
    "launcher",
)
"""Options without effect on a job that runs on this machine."""
DEBUG_OPTIONS = ("cluster", "job_dir", "folder")
"""The only options that `--cluster debug` accepts."""


def refuse_ignored_options(command: str, given: set[str], args: argparse.Namespace) -> None:
    """Refuse an option that would have no effect.

    Args:
        command: The command to submit.
        given: Names of the options on the command line.
        args: Their values, and the defaults of the others.

    Raises:
        UserError: Names the option and the reason.
    """
    reasons = {
        **_options_of_other_commands(command, args),
        **_options_of_other_clusters(command, given, args),
        **_contradicting_options(args),
    }
    # Sorted, so that one line always reports the same option first.
    for name in sorted(given & set(reasons)):
        raise UserError(f"--{name.replace('_', '-')} {reasons[name]}")
    if args.gpus_per_node.count and command not in GPU_COMMANDS:
        raise UserError(f"--gpus-per-node: {command} uses no GPU; omit the option")


def _options_of_other_commands(command: str, args: argparse.Namespace) -> dict[str, str]:
    """Option name -> why this command ignores it."""
    reasons: dict[str, str] = {}
    if command != "chain":
        reason = f"is for chain, not for {command}"
        reasons |= dict.fromkeys(("convert_tasks", "convert_sbatch"), reason)
    if not (command == "chain" or (command == "train" and args.array)):
        reason = f"is for several jobs (chain, train --array), not for {command}"
        reasons |= dict.fromkeys(("cpu_partition", "stage_option"), reason)
    if command not in ("train", "convert", "chain"):
        reasons["array"] = f"is for train, convert and chain, not for {command}"
    if command == "tune":
        reasons["launcher"] = "has no effect on tune: Ray starts its processes"
    if command == "doctor":
        names = ("after", "restarts", "follow", "parsable", "signal")
        reasons |= dict.fromkeys(names, "has no effect on doctor, which waits for its one job")
    return reasons


def _options_of_other_clusters(
    command: str, given: set[str], args: argparse.Namespace
) -> dict[str, str]:
    """Option name -> why it has no effect with this value of --cluster."""
    reasons: dict[str, str] = {}
    if args.cluster == "local":
        reasons |= dict.fromkeys(SLURM_ONLY, "has no effect with --cluster local: it is for SLURM")
        if command != "convert":
            reasons["cpus_per_task"] = (
                "has no effect with --cluster local; use train.threads or --threads"
            )
    if args.cluster == "debug":
        others = given - set(DEBUG_OPTIONS)
        reason = "has no effect with --cluster debug, which runs one process: this one"
        reasons |= dict.fromkeys(others, reason)
    return reasons


def _contradicting_options(args: argparse.Namespace) -> dict[str, str]:
    """Option name -> which other option excludes it."""
    reasons: dict[str, str] = {}
    if not args.gpus_per_node.count:
        reasons["gpu_bind"] = "needs --gpus-per-node"
    if args.dry_run:
        reason = "has no effect with --dry-run: no job is submitted"
        reasons |= dict.fromkeys(("follow", "parsable"), reason)
    if args.mem_gib:
        reasons["mem"] = "and --mem-gib set the same limit; give one of them"
    if args.cpu and args.gpus_per_node.count:
        reasons["cpu"] = f"contradicts --gpus-per-node {args.gpus_per_node.count}"
    return reasons


def build_resources(args: argparse.Namespace, command: str) -> Resources:
    """The resources of the job that runs the command itself.

    Raises:
        UserError: An option of sbatch is unknown, or contradicts an option of launch.
    """
    options = [parse_sbatch_option(text) for text in args.sbatch]
    # The main job of a chain is the training.
    default_time = DEFAULT_TIME.get("train" if command == "chain" else command)
    values: dict[str, Any] = {
        "partition": args.partition,
        "account": args.account,
        "qos": args.qos,
        "constraint": args.constraint,
        "time": default_time or DEFAULT_TIME_OTHERS,
        "mem": args.mem,
        "cpus_per_task": args.cpus_per_task,
    }
    if args.time is not None:
        values["time"] = parse_time_limit(args.time)
    _apply_sbatch_values(values, args, options)
    extra = []
    for option in options:
        if option[0].replace("-", "_") not in values:
            extra.append(format_option(option))
    extra += [format_option(parse_plugin_option(text)) for text in args.sbatch_plugin]
    if args.signal >= time_to_seconds(values["time"]):
        raise UserError(
            f"--signal {args.signal}: the job would be stopped at once; "
            f"its time limit is {values['time']}"
        )
    return Resources(
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node.count,
        gpu_type=args.gpus_per_node.model,
        tasks_per_node=args.tasks_per_node,
        mem_gib=args.mem_gib,
        extra=tuple(extra),
        signal_s=args.signal,
        distribution=args.distribution,
        cpu_bind=args.cpu_bind,
        gpu_bind=args.gpu_bind,
        **values,
    )


def _apply_sbatch_values(
    values: dict[str, Any], args: argparse.Namespace, options: list[Option]
) -> None:
    """Move resources that `--sbatch` sets to `values`. Raises `UserError` for a contradiction."""
    given: dict[str, Any] = {}
    for field, value in values.items():
        # cpus_per_task has no empty default, so its default value counts as not given.
        if getattr(args, field) not in (None, "", DEFAULT_CPUS):
            given[field] = value
    for text, (name, value) in zip(args.sbatch, options, strict=True):
        field = name.replace("-", "_")
        # Any other option is passed on unchanged.
        if field not in values or value is None:
            continue
        requested = parse_resource(name, value, f"--sbatch {name}")
        if given.get(field) not in (None, requested):
            raise UserError(f"--sbatch {text}: contradicts --{name} {given[field]}")
        values[field] = requested
