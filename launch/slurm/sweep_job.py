"""The job of a hyperparameter sweep: Ray on the nodes of the job, `launch.tune` on the first."""

import dataclasses
import importlib
from collections.abc import Sequence

from liverseg_dist.errors import UserError
from liverseg_dist.texts.paths import expand_user_path

from .. import PACKAGE as LAUNCH
from .. import PROGRAM
from .job_request import JobRequest, build_job
from .launch_options import build_parser
from .option_parser import OneLineParser, list_option_strings
from .sbatch import BatchJob


def build_sweep_job(request: JobRequest) -> BatchJob:
    """The job of a sweep.

    Raises:
        UserError: `launch.tune` would refuse the arguments, or run.dir is missing.
    """
    words = request.arguments
    check_sweep_arguments(words)
    run_dirs = [word.removeprefix("run.dir=") for word in words if word.startswith("run.dir=")]
    # The last assignment counts, as for all settings.
    run = expand_user_path(run_dirs[-1]) if run_dirs else None
    folder = request.folder or run
    if folder is None:
        raise UserError(
            "run.dir is not set; give the sweep a folder on a shared file system, "
            "e.g. run.dir=runs/sweep"
        )
    job = build_job(request, "tune", (), folder)
    run_root = run.absolute() if run is not None else job.folder
    return dataclasses.replace(
        job,
        module=(f"{LAUNCH}.tune", *words),
        launcher="ray",
        run=None if run_root == job.folder else run_root,
    )


def check_sweep_arguments(words: Sequence[str]) -> None:
    """Find the mistakes that `launch.tune` would report only when the job starts.

    Raises:
        UserError: An argument or a setting is invalid.
    """
    # Imported by name, because it imports Ray, which takes seconds.
    tune = importlib.import_module(f"{LAUNCH}.tune")
    parser = OneLineParser(
        prog=f"{PROGRAM} tune",
        parents=[tune.build_parser()],
        add_help=False,
        help_lines=f"{PROGRAM} --help and python -m {LAUNCH}.tune --help",
        also=list_option_strings(build_parser()),
    )
    args = parser.parse_intermixed_args(list(words))
    if args.address or args.cpus:
        name = "--address" if args.address else "--cpus"
        raise UserError(
            f"{name}: the job starts its own Ray cluster on its nodes; "
            "set its size with --cpus-per-task and --nodes"
        )
    tune.load_sweep(args)
