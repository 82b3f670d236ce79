"""From a command line to its jobs. Every mistake that can be found before submission is found here.

A command becomes one job; or an array of folds, their evaluation and one aggregate; or conversion,
training and evaluation, each of which waits for the job before it.
"""

import argparse
import dataclasses
from pathlib import Path

from liverseg_dist.errors import UserError
from liverseg_dist.evaluation.results import EVALUATION
from liverseg_dist.inference.evaluation_results import refuse_slabs_over_scans
from liverseg_dist.texts.paths import path_argument

from .. import PROGRAM
from .arrays import ArrayExpression
from .job_request import JobRequest, JobStep, build_job, build_stage_job, parse_command
from .launch_options import build_parser
from .option_parser import OneLineParser, list_option_strings
from .sbatch import INDEX, BatchJob
from .stages import check_stages, compute_stage_resources, limit_to_one_process
from .sweep_job import build_sweep_job
from .training_jobs import (
    build_training_job,
    count_folds_to_train,
    load_training_settings,
    plan_folds,
)

RANKED_COMMANDS = ("train", "evaluate", "predict")
"""Commands that divide their work among ranks; the others run in one process."""


def plan_jobs(request: JobRequest) -> list[JobStep]:
    """The jobs of a request, in the order of submission.

    Args:
        request: The request; its command is one that `launch` knows (see `launch.cli`).

    Raises:
        UserError: An argument, a setting or an option is invalid.
    """
    if request.command == "chain":
        return _plan_chain(request)
    if request.command == "tune":
        return [JobStep(build_sweep_job(request))]
    args = parse_command(request.command, request.arguments)
    if request.command == "train":
        return _plan_training(request, args)
    # More GPUs make more ranks, and these commands have one.
    needs_ranks = request.resources.ranks > 1 or request.launcher != "srun"
    if needs_ranks and request.command not in RANKED_COMMANDS:
        raise UserError(
            f"{request.command} runs in one process; request one node, one task and at most one "
            "GPU, and omit --launcher"
        )
    if request.command == "convert":
        tasks = _parse_task_count(request.array, "--array")
        folder = request.folder or Path(f"{args.store}.jobs")
        return [JobStep(_build_conversion_job(request, args, folder, tasks))]
    return [JobStep(_build_other_job(request, args))]


def _plan_training(request: JobRequest, args: argparse.Namespace) -> list[JobStep]:
    """One training, or with `--array` one per fold, their evaluation and an aggregate."""
    # With --after another job may write the store before this one starts.
    store_exists = not request.after
    settings = load_training_settings(args, request, store_exists=store_exists)
    if request.array is None:
        return [JobStep(build_training_job(request, settings))]
    count = count_folds_to_train(settings, args, store_exists=store_exists)
    return plan_folds(request, settings, count)


def _build_other_job(request: JobRequest, args: argparse.Namespace) -> BatchJob:
    """The job of a command other than train, tune, chain and convert."""
    # Only evaluate has the folder of a run.
    run = Path("runs/jobs")
    if request.command == "evaluate":
        run = args.run
        if not (args.source or args.out or args.part or args.cases):
            # An evaluation on slabs must not replace one on complete scans.
            refuse_slabs_over_scans(run / EVALUATION)
    job = build_job(request, request.command, request.arguments, request.folder or run)
    results = args.out if request.command in ("evaluate", "predict") else None
    return dataclasses.replace(job, progress=None if results is None else results.absolute())


def _parse_task_count(array: ArrayExpression | None, option: str) -> ArrayExpression:
    """The tasks of a conversion, 0 to N-1.

    None can be left out, because each task converts its share of the scans.

    Raises:
        UserError: The expression names other indices.
    """
    if array is None:
        return ArrayExpression("1", (0,))
    if array.number is not None:
        if array.number < 1:
            raise UserError(f"{option} {array.text}: at least one task")
        return dataclasses.replace(array, indices=tuple(range(array.number)))
    if array.indices and array.indices == tuple(range(len(array.indices))):
        return array
    raise UserError(
        f"{option} {array.text}: for a conversion give the number of tasks, e.g. 8, 8%4 or 0-7; "
        "each converts its share of the scans, so none can be left out"
    )


def _build_conversion_job(
    request: JobRequest, args: argparse.Namespace, folder: Path, array: ArrayExpression
) -> BatchJob:
    """The job that converts the scans, as an array if there are several tasks."""
    tasks = len(array.indices)
    resources = limit_to_one_process(request.resources)
    if tasks > 1 and args.shard:
        raise UserError("--shard: an array sets it for each task; omit it")
    arguments = list(request.arguments)
    if tasks > 1:
        arguments += ["--shard", f"{INDEX}/{tasks}"]
    if not any(override.startswith("convert.workers=") for override in args.overrides):
        arguments.append(f"convert.workers={resources.cpus_per_task}")
    return dataclasses.replace(
        build_job(request, "convert", arguments, folder),
        resources=resources,
        launcher="srun",
        array=array.format_indices(array.indices) if tasks > 1 else "",
        progress=args.store.absolute(),
    )


def _plan_chain(request: JobRequest) -> list[JobStep]:
    """`chain SRC STORE [--config FILE] [KEY=VALUE]`: convert, then train, then evaluate."""
    args = _parse_chain_arguments(request)
    configs = []
    for path in args.config:
        configs += ["--config", str(path)]
    arguments = (*configs, *args.overrides, f"data.store={args.store}")
    # The training waits for the conversion, which waits for --after.
    training = dataclasses.replace(request, command="train", arguments=arguments, after="")
    train_args = parse_command("train", arguments)
    settings = load_training_settings(train_args, training, store_exists=False)
    assert settings.run.dir is not None
    folder = Path(request.folder or settings.run.dir)

    convert_overrides = [text for text in args.overrides if text.startswith("convert.")]
    arguments = (str(args.source), str(args.store), *configs, *convert_overrides)
    conversion = JobStep(_build_chain_conversion_job(request, arguments, folder))
    if request.array is not None:
        count = count_folds_to_train(settings, train_args, store_exists=False)
        first, *others = plan_folds(training, settings, count, args.source)
        return [conversion, dataclasses.replace(first, waits_for=1), *others]

    named = dataclasses.replace(training, name=f"{request.name}-train" if request.name else "")
    resources = build_stage_job(training, "train", (), folder).resources
    train = dataclasses.replace(build_training_job(named, settings), resources=resources)
    arguments = (str(settings.run.dir), "--store", str(args.store), "--source", str(args.source))
    evaluate = build_stage_job(training, "evaluate", arguments, folder)
    return [conversion, JobStep(train, 1), JobStep(evaluate, 1)]


def _parse_chain_arguments(request: JobRequest) -> argparse.Namespace:
    """Parse and check the arguments of `chain`. Raises `UserError`."""
    parser = OneLineParser(
        prog=f"{PROGRAM} chain",
        help_lines=f"{PROGRAM} --help",
        also=list_option_strings(build_parser()),
    )
    parser.add_argument("source", type=path_argument, metavar="SRC")
    parser.add_argument("store", type=path_argument, metavar="STORE")
    parser.add_argument("--config", action="append", type=path_argument, default=[], metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args(list(request.arguments))
    # Otherwise the job would fail after its wait in the queue.
    if not (args.source / "dataset.json").is_file():
        raise UserError(
            f"{args.source}: has no dataset.json; SRC is a folder in the layout of Task03_Liver"
        )
    stages = ["convert", "train", "evaluate"]
    if request.array is not None:
        stages.append("aggregate")
    check_stages(request.stage_options, stages)
    return args


def _build_chain_conversion_job(
    request: JobRequest, arguments: tuple[str, ...], folder: Path
) -> BatchJob:
    """The conversion of a chain, with the resources of its stage."""
    resources = compute_stage_resources(
        request.resources,
        "convert",
        request.stage_options,
        cpu_partition=request.cpu_partition,
        is_first=True,
    )
    conversion = dataclasses.replace(
        request,
        command="convert",
        arguments=arguments,
        name=f"{request.name}-convert" if request.name else "",
        resources=resources,
    )
    tasks = _parse_task_count(request.convert_tasks, "--convert-tasks")
    return _build_conversion_job(conversion, parse_command("convert", arguments), folder, tasks)
