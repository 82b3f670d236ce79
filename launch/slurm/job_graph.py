"""From a command line to the jobs it means, with every mistake that can be found before submission found here.

One job; or five folds as an array, then their evaluation, then one aggregate; or conversion, training and evaluation
in a row, each waiting for the one before.
"""

import argparse
import dataclasses
import hashlib
import importlib
import itertools
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch

from launch.slurm.sbatch import INDEX, BatchJob, Resources
from liverseg_dist.commands.evaluate import refuse_slabs_over_scans
from liverseg_dist.commands.main import COMMANDS
from liverseg_dist.commands.train import list_store_conflicts
from liverseg_dist.config import Settings, load_settings
from liverseg_dist.data.splits import fold_count
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.distributed.strategies.parallelize import check_strategy
from liverseg_dist.errors import UserError
from liverseg_dist.evaluation.results import EVALUATION
from liverseg_dist.texts.paths import expand_path, path_argument

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
    array: str = ""
    """`folds` (train, chain) or a number of array tasks (convert); empty: no array."""
    convert_tasks: int = 1
    convert_sbatch: tuple[str, ...] = ()
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
        raise UserError(
            f"{request.command}: no such command; one of {', '.join(COMMANDS)}, tune, chain"
        )
    args = parse_command(request.command, request.arguments)
    if request.command == "train":
        settings = _training(args, request, store_exists=not request.after)
        if request.array == "folds":
            return _folds(
                request, settings, folds_of(settings, args, store_exists=not request.after)
            )
        return [JobStep(_train(request, settings))]
    if request.command == "convert":
        return [JobStep(_convert(request, args, request.folder or Path(f"{args.store}.jobs")))]
    if request.array:
        raise UserError("--array: is for train (folds) and convert (a number of tasks)")
    if request.resources.ranks > 1 and request.command not in RANKED:
        raise UserError(f"{request.command} runs in one process; ask for one node and one task")
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
    parser = _Parser(prog=f"liverseg {command}")
    parser.add_argument("--json", action="store_true")
    importlib.import_module(f"{PACKAGE}.commands.{command}").add_arguments(parser)
    return parser.parse_intermixed_args(list(arguments))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


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
        if told := list_store_conflicts(settings, store, args.overrides):
            print(f"warning: {told}", file=sys.stderr)
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
    request: JobRequest, settings: Settings, folds: int, source: Path | None = None
) -> list[JobStep]:
    """Training of all folds, their evaluation on the validation cases (each fold's when it is ready), one aggregate."""
    assert settings.run.dir is not None
    home = settings.run.dir.absolute()
    folder = (request.folder or home).absolute()
    run, array = home / f"fold_{INDEX}", f"0-{folds - 1}"
    kept = [word for word in request.arguments if not word.startswith("run.dir=")]
    train = _job(request, "train", [*kept, f"run.dir={run}", f"data.fold={INDEX}"], folder)
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
    evaluate = _job(request, "evaluate", arguments, folder)
    evaluate = dataclasses.replace(evaluate, array=array, run=run, after="")
    aggregate = dataclasses.replace(
        _job(request, "aggregate", (), folder),
        module=("launch.slurm.pool_folds", str(home), str(folds)),
        resources=one_process(request.resources),
        launcher="srun",
        after="",
    )
    return [JobStep(train), JobStep(evaluate, 1, "aftercorr"), JobStep(aggregate, 1, "afterok")]


def one_process(resources: Resources) -> Resources:
    return dataclasses.replace(resources, nodes=1, gpus_per_node=0, tasks_per_node=1)


def _convert(request: JobRequest, args: argparse.Namespace, folder: Path) -> BatchJob:
    tasks = int(request.array) if request.array.isdigit() else request.convert_tasks
    if request.array and not request.array.isdigit():
        raise UserError(
            f"--array {request.array}: for convert it is a number of tasks, e.g. --array 8"
        )
    resources = one_process(request.resources)
    resources = dataclasses.replace(resources, extra=(*resources.extra, *request.convert_sbatch))
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
        array=f"0-{tasks - 1}" if tasks > 1 else "",
        progress=args.store.absolute(),
    )


def _chain(request: JobRequest) -> list[JobStep]:
    """`chain SRC STORE [--config FILE] [KEY=VALUE]`: convert, then train, then evaluate."""
    parser = _Parser(prog="python -m launch chain")
    parser.add_argument("source", type=path_argument, metavar="SRC")
    parser.add_argument("store", type=path_argument, metavar="STORE")
    parser.add_argument("--config", action="append", type=path_argument, default=[], metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args(list(request.arguments))
    if not (args.source / "dataset.json").is_file():
        raise UserError(
            f"{args.source}: holds no dataset.json; SRC is a folder in the layout of Task03_Liver"
        )
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
    convert = dataclasses.replace(request, command="convert", arguments=words, array="", name="")
    steps = [JobStep(_convert(convert, parse_command("convert", words), folder))]
    if request.array == "folds":
        folds = folds_of(settings, parse_command("train", train.arguments), store_exists=False)
        training = _folds(dataclasses.replace(train, name=""), settings, folds, args.source)
        return [*steps, dataclasses.replace(training[0], waits_for=1), *training[1:]]
    if request.array:
        raise UserError(
            "--array: for a chain it is folds; --convert-tasks N divides the conversion"
        )
    evaluate = _job(
        dataclasses.replace(request, name="", after=""),
        "evaluate",
        [str(settings.run.dir), "--store", str(args.store), "--source", str(args.source)],
        folder,
    )
    training_step = JobStep(_train(dataclasses.replace(train, name=""), settings), 1)
    return [*steps, training_step, JobStep(evaluate, 1)]


def _tune(request: JobRequest) -> BatchJob:
    """A sweep: Ray over the job's nodes, its driver on the first."""
    words = request.arguments
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
        module=("launch.tune", *words),
        launcher="ray",
        run=None if home == job.folder else home,
    )


def _expand(text: str) -> Path:
    try:
        return expand_path(text)
    except ValueError as error:
        raise UserError(f"{text}: {error}") from None


def freeze_configs(job: BatchJob, *, write: bool) -> BatchJob:
    """Let the job read copies of its config files: an edited file must not change a job that waits in the queue."""
    words = list(job.module)
    for i, (flag, value) in enumerate(itertools.pairwise(words)):
        if flag != "--config" or not _expand(value).is_file():
            continue
        file = _expand(value)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
        copy = job.folder / "jobs" / f"{file.stem}-{digest}.yaml"
        words[i + 1] = str(copy)
        if write and not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    return dataclasses.replace(job, module=tuple(words))
