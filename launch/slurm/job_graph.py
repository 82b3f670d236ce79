"""From a command line to the jobs it means, with every mistake that can be found before submission found here.

One job; or five folds as an array, then their evaluation, then one aggregate; or conversion, training and evaluation
in a row, each waiting for the one before.
"""

import argparse
import dataclasses
import importlib
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from liverseg_dist.commands.main import COMMANDS, add_command_arguments
from liverseg_dist.config import Settings, load_settings
from liverseg_dist.data.splits import fold_count
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.distributed.strategies.parallelize import check_strategy
from liverseg_dist.errors import UserError
from liverseg_dist.evaluation.results import EVALUATION
from liverseg_dist.inference.evaluation_results import refuse_slabs_over_scans
from liverseg_dist.texts.paths import expand_path, path_argument
from liverseg_dist.training.store_conflicts import describe_store_conflicts

from .. import PACKAGE as LAUNCH
from .. import PROGRAM
from .arrays import ArrayExpression
from .launch_options import OneLineParser, build_parser, option_strings, suggest_option
from .sbatch import INDEX, BatchJob, Resources
from .stages import StageOption, check_stages, one_process, stage_resources

RANKED = ("train", "evaluate", "predict")
"""Commands that divide their work among ranks; the others run in one process."""
PACKAGE = "liverseg_dist"


@dataclass(frozen=True)
class JobRequest:
    """What was asked for."""

    command: str
    arguments: tuple[str, ...]
    resources: Resources = field(default_factory=Resources)
    folder: Path | None = None
    """Where job file, logs and records go; default: the run's folder."""
    name: str = ""
    array: ArrayExpression | None = None
    """Folds (train, chain) or a number of tasks (convert); None: no array."""
    convert_tasks: ArrayExpression | None = None
    """Of a chain; None: one."""
    stage_options: tuple[StageOption, ...] = ()
    cpu_partition: str = ""
    environment: tuple[str, ...] = ()
    setup: Path | None = None
    launcher: str = "srun"
    after: str = ""
    restarts: int = 5


@dataclass(frozen=True)
class JobStep:
    """A job of a plan. `waits_for`: how many steps back is the one it follows (0: none); `how`: SLURM's word for it."""

    job: BatchJob
    waits_for: int = 0
    how: str = "afterok"


def plan_jobs(request: JobRequest) -> list[JobStep]:
    """The jobs in the order of submission. Raises `UserError`."""
    if request.command == "chain":
        return _chain(request)
    if request.command == "tune":
        return [JobStep(_tune(request))]
    if request.command not in COMMANDS:
        known = (*COMMANDS, "tune", "chain", "doctor", "status", "logs", "cancel")
        guess = suggest_option(request.command, known)
        raise UserError(
            f"{request.command}: no such command{guess}; one of {', '.join(dict.fromkeys(known))}"
        )
    args = parse_command(request.command, request.arguments)
    if request.command == "train":
        settings = _training(args, request, store_exists=not request.after)
        if request.array is not None:
            return _folds(
                request, settings, folds_of(settings, args, store_exists=not request.after)
            )
        return [JobStep(_train(request, settings))]
    # More GPUs make more ranks, and these commands have one.
    if request.command not in RANKED and (
        request.resources.ranks > 1 or request.launcher != "srun"
    ):
        raise UserError(
            f"{request.command} runs in one process; ask for one node, one task, at most one GPU, and no --launcher"
        )
    if request.command == "convert":
        tasks = _count_tasks(request.array, "--array")
        return [
            JobStep(_convert(request, args, request.folder or Path(f"{args.store}.jobs"), tasks))
        ]
    run = args.run if request.command == "evaluate" else Path("runs/jobs")
    if request.command == "evaluate" and not (args.source or args.out or args.part or args.cases):
        refuse_slabs_over_scans(run / EVALUATION)
    job = _job(request, request.command, request.arguments, request.folder or run)
    results = args.out if request.command in ("evaluate", "predict") else None
    return [
        JobStep(
            dataclasses.replace(job, progress=results.absolute() if results is not None else None)
        )
    ]


def parse_command(command: str, arguments: Sequence[str]) -> argparse.Namespace:
    """The command's own parser on its arguments. Raises `UserError` where the command would refuse them."""
    own = option_strings(build_parser())
    help_lines = f"{PROGRAM} --help and liverseg {command} --help"
    parser = OneLineParser(prog=f"{PROGRAM} {command}", help_lines=help_lines, also=own)
    parser.add_argument("--json", action="store_true")
    add_command_arguments(command, parser)
    return parser.parse_intermixed_args(list(arguments))


def _training(args: argparse.Namespace, request: JobRequest, *, store_exists: bool) -> Settings:
    settings = load_settings(args.config, args.overrides)
    if settings.run.dir is None:
        raise UserError(
            "run.dir is not set; give the run a folder on a shared file system, e.g. run.dir=runs/first"
        )
    if settings.data.store is None:
        raise UserError(
            "data.store is not set; make one with tools/to_zarr and pass data.store=STORE"
        )
    resources = request.resources
    check_strategy(
        settings.train, resources.ranks, torch.device("cuda" if resources.gpus_per_node else "cpu")
    )
    if store_exists:
        store = CaseStore.open(settings.data.store)
        store.ids("train", settings.data.fold)
        if conflicts := describe_store_conflicts(settings, store, args.overrides):
            print(f"warning: {conflicts}", file=sys.stderr)
    return settings


def folds_of(settings: Settings, args: argparse.Namespace, *, store_exists: bool) -> int:
    """How many folds the store has, or will have."""
    if any(override.startswith("data.fold=") for override in args.overrides):
        raise UserError("data.fold: --array folds gives each task its own; leave it out")
    if store_exists and settings.data.store is not None:
        return len(CaseStore.open(settings.data.store).root["splits"]["folds"])
    return fold_count(settings.convert.splits)


def _job(request: JobRequest, command: str, arguments: Sequence[str], folder: Path) -> BatchJob:
    return BatchJob(
        name=request.name or f"liverseg-{command}",
        module=(PACKAGE, command, *arguments),
        folder=folder.absolute(),
        resources=request.resources,
        launcher=request.launcher,
        after=f"afterok:{request.after}" if request.after else "",
        restarts=request.restarts,
        is_main=command in ("train", "tune"),
        environment=request.environment,
        setup=request.setup,
    )


def _train(
    request: JobRequest, settings: Settings, arguments: Sequence[str] | None = None
) -> BatchJob:
    assert settings.run.dir is not None
    run = settings.run.dir.absolute()
    job = _job(
        request,
        "train",
        request.arguments if arguments is None else arguments,
        request.folder or run,
    )
    return job if job.folder == run else dataclasses.replace(job, run=run)


def _folds(
    request: JobRequest, settings: Settings, count: int, source: Path | None = None
) -> list[JobStep]:
    """Training of folds, their evaluation on the validation cases (each when its fold is ready), one aggregate.

    Args:
        request: as given; `array` names the folds.
        settings: of the training.
        count: how many folds the store has.
        source: whole scans to evaluate on, instead of the store's slabs.
    """
    assert settings.run.dir is not None
    assert request.array is not None
    folds = choose_folds(request.array, count)
    home = settings.run.dir.absolute()
    folder = (request.folder or home).absolute()
    run, array = home / f"fold_{INDEX}", request.array.with_indices(folds)
    kept = [word for word in request.arguments if not word.startswith("run.dir=")]
    words = [*kept, f"run.dir={run}", f"data.fold={INDEX}"]
    train = _stage_job(request, "train", words, folder, is_first=source is None)
    train = dataclasses.replace(train, array=array, run=run)
    out = run / "evaluation" / "validation"
    arguments = [
        str(run),
        "--store",
        str(settings.data.store),
        "--part",
        "validation",
        "--out",
        str(out),
    ]
    if source is not None:
        arguments += ["--source", str(source)]
    evaluate = _stage_job(request, "evaluate", arguments, folder)
    evaluate = dataclasses.replace(evaluate, array=array, run=run, after="")
    only = [] if len(folds) == count else ["--only", ",".join(map(str, folds))]
    aggregate = dataclasses.replace(
        _stage_job(request, "aggregate", (), folder),
        module=(f"{LAUNCH}.slurm.pool_folds", str(home), str(count), *only),
        launcher="srun",
        after="",
    )
    return [JobStep(train), JobStep(evaluate, 1, "aftercorr"), JobStep(aggregate, 1, "afterok")]


def choose_folds(array: ArrayExpression, count: int) -> list[int]:
    """The folds that `--array` names. Raises `UserError` for one that the store does not have."""
    if missing := [index for index in array.indices if index >= count]:
        raise UserError(
            f"--array {array.text}: no fold {missing[0]}; the store has {count}, 0 to {count - 1}"
        )
    return list(array.indices) or list(range(count))


def _stage_job(
    request: JobRequest,
    stage: str,
    arguments: Sequence[str],
    folder: Path,
    *,
    is_first: bool = False,
) -> BatchJob:
    """A job of a plan of several, with its stage's resources and a name of its own."""
    job = _job(request, stage, arguments, folder)
    resources = stage_resources(
        request.resources,
        stage,
        request.stage_options,
        cpu_partition=request.cpu_partition,
        is_first=is_first,
    )
    name = f"{request.name}-{stage}" if request.name else job.name
    return dataclasses.replace(job, resources=resources, name=name)


def _count_tasks(array: ArrayExpression | None, option: str) -> ArrayExpression:
    """The tasks of a conversion, 0 to N-1: all of them, as each converts its share of the scans."""
    if array is None:
        return ArrayExpression("1", (0,))
    if array.number is not None:
        if array.number < 1:
            raise UserError(f"{option} {array.text}: at least one task")
        return dataclasses.replace(array, indices=tuple(range(array.number)))
    if array.indices and array.indices == tuple(range(len(array.indices))):
        return array
    raise UserError(
        f"{option} {array.text}: for a conversion it is a number of tasks, e.g. 8, 8%4 or 0-7; each converts its "
        "share of the scans, so none can be left out"
    )


def _convert(
    request: JobRequest, args: argparse.Namespace, folder: Path, array: ArrayExpression
) -> BatchJob:
    tasks = len(array.indices)
    resources = one_process(request.resources)
    shard = ["--shard", f"{INDEX}/{tasks}"] if tasks > 1 else []
    if tasks > 1 and args.shard:
        raise UserError("--shard: an array gives each task its own; leave it out")
    workers = [f"convert.workers={resources.cpus_per_task}"]
    if any(override.startswith("convert.workers=") for override in args.overrides):
        workers = []
    job = _job(request, "convert", [*request.arguments, *shard, *workers], folder)
    return dataclasses.replace(
        job,
        resources=resources,
        launcher="srun",
        array=array.with_indices(array.indices) if tasks > 1 else "",
        progress=args.store.absolute(),
    )


def _chain(request: JobRequest) -> list[JobStep]:
    """`chain SRC STORE [--config FILE] [KEY=VALUE]`: convert, then train, then evaluate."""
    parser = OneLineParser(
        prog=f"{PROGRAM} chain", help_lines=f"{PROGRAM} --help", also=option_strings(build_parser())
    )
    parser.add_argument("source", type=path_argument, metavar="SRC")
    parser.add_argument("store", type=path_argument, metavar="STORE")
    parser.add_argument("--config", action="append", type=path_argument, default=[], metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args(list(request.arguments))
    if not (args.source / "dataset.json").is_file():
        raise UserError(
            f"{args.source}: holds no dataset.json; SRC is a folder in the layout of Task03_Liver"
        )
    stages = (
        "convert",
        "train",
        "evaluate",
        *(("aggregate",) if request.array is not None else ()),
    )
    check_stages(request.stage_options, stages)
    configs = list(itertools.chain.from_iterable(("--config", str(path)) for path in args.config))
    of_convert = [text for text in args.overrides if text.startswith("convert.")]
    store = [f"data.store={args.store}"]
    train = dataclasses.replace(
        request, command="train", arguments=(*configs, *args.overrides, *store), after=""
    )
    settings = _training(parse_command("train", train.arguments), train, store_exists=False)
    assert settings.run.dir is not None
    folder = request.folder or settings.run.dir
    words = (str(args.source), str(args.store), *configs, *of_convert)
    steps = [JobStep(_convert_of_chain(request, words, folder))]
    if request.array is not None:
        folds = folds_of(settings, parse_command("train", train.arguments), store_exists=False)
        training = _folds(train, settings, folds, args.source)
        return [*steps, dataclasses.replace(training[0], waits_for=1), *training[1:]]
    words = (str(settings.run.dir), "--store", str(args.store), "--source", str(args.source))
    evaluate = _stage_job(train, "evaluate", words, Path(folder))
    named = dataclasses.replace(train, name=f"{request.name}-train" if request.name else "")
    training_job = dataclasses.replace(
        _train(named, settings), resources=_stage_job(train, "train", (), Path(folder)).resources
    )
    return [*steps, JobStep(training_job, 1), JobStep(evaluate, 1)]


def _convert_of_chain(request: JobRequest, words: tuple[str, ...], folder: Path) -> BatchJob:
    resources = stage_resources(
        request.resources,
        "convert",
        request.stage_options,
        cpu_partition=request.cpu_partition,
        is_first=True,
    )
    name = f"{request.name}-convert" if request.name else ""
    convert = dataclasses.replace(
        request, command="convert", arguments=words, name=name, resources=resources
    )
    tasks = _count_tasks(request.convert_tasks, "--convert-tasks")
    return _convert(convert, parse_command("convert", words), folder, tasks)


def _tune(request: JobRequest) -> BatchJob:
    """A sweep: Ray over the job's nodes, its driver on the first."""
    words = request.arguments
    _check_sweep(words)
    run = next(
        (word.removeprefix("run.dir=") for word in reversed(words) if word.startswith("run.dir=")),
        None,
    )
    if run is None and request.folder is None:
        raise UserError(
            "run.dir is not set; give the sweep a folder on a shared file system, e.g. run.dir=runs/sweep"
        )
    job = _job(request, "tune", (), request.folder or _expand(str(run)))
    home = _expand(run).absolute() if run else job.folder
    return dataclasses.replace(
        job,
        module=(f"{LAUNCH}.tune", *words),
        launcher="ray",
        run=None if home == job.folder else home,
    )


def _check_sweep(words: Sequence[str]) -> None:
    """What launch.tune itself would refuse at its start, in the job. Raises `UserError`."""
    # By name, as Ray comes with it, which takes seconds.
    tune = importlib.import_module(f"{LAUNCH}.tune")
    options = tune.build_parser()
    own = option_strings(build_parser())
    parser = OneLineParser(
        prog=f"{PROGRAM} tune",
        parents=[options],
        add_help=False,
        help_lines=f"{PROGRAM} --help and python -m {LAUNCH}.tune --help",
        also=own,
    )
    args = parser.parse_intermixed_args(list(words))
    if args.address or args.cpus:
        name = "--address" if args.address else "--cpus"
        raise UserError(
            f"{name}: the job starts a Ray of its own on its nodes; --cpus-per-task and --nodes size it"
        )
    tune.load_sweep(args)


def _expand(text: str) -> Path:
    try:
        return expand_path(text)
    except ValueError as error:
        raise UserError(f"{text}: {error}") from None
