"""The jobs of a training: one run, or several folds with their evaluation and one pooled report."""

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from liverseg_dist.config import Settings, load_settings
from liverseg_dist.data.splits import count_folds
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.distributed.strategies.parallelize import check_strategy
from liverseg_dist.errors import UserError
from liverseg_dist.training.store_conflicts import describe_store_conflicts

from .. import PACKAGE as LAUNCH
from .arrays import ArrayExpression
from .job_request import JobRequest, JobStep, build_job, build_stage_job
from .sbatch import INDEX, BatchJob

_logger = logging.getLogger(__name__)


def load_training_settings(
    args: argparse.Namespace, request: JobRequest, *, store_exists: bool
) -> Settings:
    """The settings of a training, checked against the resources and the store.

    Args:
        args: The parsed arguments of `train`.
        request: The request.
        store_exists: False if an earlier job writes the store.

    Raises:
        UserError: A setting is missing or does not fit the resources or the store.
    """
    settings = load_settings(args.config, args.overrides)
    if settings.run.dir is None:
        raise UserError(
            "run.dir is not set; give the run a folder on a shared file system, "
            "e.g. run.dir=runs/first"
        )
    if settings.data.store is None:
        raise UserError(
            "data.store is not set; make one with tools/to_zarr and pass data.store=STORE"
        )
    resources = request.resources
    device = torch.device("cuda" if resources.gpus_per_node else "cpu")
    check_strategy(settings.train, resources.ranks, device)
    if store_exists:
        store = CaseStore.open(settings.data.store)
        # Raises if the store does not have the fold.
        store.ids("train", settings.data.fold)
        if conflicts := describe_store_conflicts(settings, store, args.overrides):
            _logger.warning("%s", conflicts)
    return settings


def count_folds_to_train(
    settings: Settings, args: argparse.Namespace, *, store_exists: bool
) -> int:
    """How many folds the store has, or will have. Raises `UserError` if one fold is chosen."""
    if any(override.startswith("data.fold=") for override in args.overrides):
        raise UserError("data.fold: --array folds sets it for each task; omit it")
    if store_exists and settings.data.store is not None:
        return len(CaseStore.open(settings.data.store).root["splits"]["folds"])
    return count_folds(settings.convert.splits)


def build_training_job(request: JobRequest, settings: Settings) -> BatchJob:
    """The job of one training run."""
    assert settings.run.dir is not None
    run = settings.run.dir.absolute()
    job = build_job(request, "train", request.arguments, request.folder or run)
    return job if job.folder == run else dataclasses.replace(job, run=run)


def plan_folds(
    request: JobRequest, settings: Settings, count: int, source: Path | None = None
) -> list[JobStep]:
    """The jobs of a cross-validation.

    An array trains the folds; a second array evaluates each fold on its validation cases as soon
    as it is trained; one job pools the results.

    Args:
        request: The request; `array` names the folds.
        settings: The settings of the training.
        count: How many folds the store has.
        source: Folder of the scans to evaluate on, instead of the slabs of the store.

    Raises:
        UserError: `array` names a fold that the store does not have.
    """
    assert settings.run.dir is not None
    assert request.array is not None
    folds = choose_folds(request.array, count)
    run_root = settings.run.dir.absolute()
    folder = (request.folder or run_root).absolute()
    run = run_root / f"fold_{INDEX}"
    array = request.array.format_indices(folds)

    # Each fold has its own run folder and fold number.
    shared = [word for word in request.arguments if not word.startswith("run.dir=")]
    arguments = [*shared, f"run.dir={run}", f"data.fold={INDEX}"]
    train = build_stage_job(request, "train", arguments, folder, is_first=source is None)
    train = dataclasses.replace(train, array=array, run=run)

    arguments = _evaluation_arguments(run, settings, source)
    evaluate = build_stage_job(request, "evaluate", arguments, folder)
    # It waits for the training, which waits for --after.
    evaluate = dataclasses.replace(evaluate, array=array, run=run, after="")

    only = [] if len(folds) == count else ["--only", ",".join(map(str, folds))]
    aggregate = dataclasses.replace(
        build_stage_job(request, "aggregate", (), folder),
        module=(f"{LAUNCH}.slurm.pool_folds", str(run_root), str(count), *only),
        launcher="srun",
        after="",
    )
    # aftercorr: the evaluation of a fold waits for the training of this fold only.
    return [JobStep(train), JobStep(evaluate, 1, "aftercorr"), JobStep(aggregate, 1, "afterok")]


def _evaluation_arguments(run: Path, settings: Settings, source: Path | None) -> list[str]:
    """Arguments of the evaluation of one fold on its validation cases."""
    arguments = [str(run), "--store", str(settings.data.store), "--part", "validation"]
    arguments += ["--out", str(run / "evaluation" / "validation")]
    if source is not None:
        arguments += ["--source", str(source)]
    return arguments


def choose_folds(array: ArrayExpression, count: int) -> Sequence[int]:
    """The folds that `--array` names. Raises `UserError` for one that the store does not have."""
    missing = [index for index in array.indices if index >= count]
    if missing:
        raise UserError(
            f"--array {array.text}: no fold {missing[0]}; the store has {count}, 0 to {count - 1}"
        )
    return list(array.indices) or list(range(count))
