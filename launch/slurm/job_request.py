"""The request of one `launch` command, and the jobs that it becomes.

`job_graph` turns a request into steps. The helpers here build the batch job that every step has,
and check the arguments of a command with the parser of that command.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from liverseg_dist.commands.main import add_command_arguments

from .. import PROGRAM
from .arrays import ArrayExpression
from .launch_options import build_parser
from .option_parser import OneLineParser, list_option_strings
from .sbatch import DEFAULT_RESTARTS, BatchJob, Resources
from .stages import StageOption, compute_stage_resources

PACKAGE = "liverseg_dist"


@dataclass(frozen=True)
class JobRequest:
    """The command to submit and the options of `launch`."""

    command: str
    arguments: tuple[str, ...]
    resources: Resources = field(default_factory=Resources)
    folder: Path | None = None
    """The folder of batch file, logs and records; default: the folder of the run."""
    name: str = ""
    array: ArrayExpression | None = None
    """Folds (train, chain) or a number of tasks (convert); None: no array."""
    convert_tasks: ArrayExpression | None = None
    """Tasks of the conversion of a chain; None: one."""
    stage_options: tuple[StageOption, ...] = ()
    cpu_partition: str = ""
    environment: tuple[str, ...] = ()
    setup: Path | None = None
    launcher: str = "srun"
    after: str = ""
    restarts: int = DEFAULT_RESTARTS


@dataclass(frozen=True)
class JobStep:
    """One job of a submission, and the job it waits for."""

    job: BatchJob
    waits_for: int = 0
    """How many steps before this one is the job it waits for; 0: it waits for none."""
    dependency: str = "afterok"
    """SLURM's type of the dependency."""


def parse_command(command: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of a liverseg command with its own parser.

    Raises:
        UserError: The command would refuse them.
    """
    parser = OneLineParser(
        prog=f"{PROGRAM} {command}",
        help_lines=f"{PROGRAM} --help and liverseg {command} --help",
        also=list_option_strings(build_parser()),
    )
    add_command_arguments(command, parser)
    return parser.parse_intermixed_args(list(arguments))


def build_job(
    request: JobRequest, command: str, arguments: Sequence[str], folder: Path
) -> BatchJob:
    """The batch job of a liverseg command.

    Args:
        request: The request; its resources become those of the job.
        command: The liverseg command to run.
        arguments: Its arguments.
        folder: The folder of batch file, logs and records.
    """
    return BatchJob(
        name=request.name or f"liverseg-{command}",
        module=(PACKAGE, command, *arguments),
        folder=folder.absolute(),
        resources=request.resources,
        launcher=request.launcher,
        after=f"afterok:{request.after}" if request.after else "",
        restarts=request.restarts,
        is_folder_job=command in ("train", "tune"),
        environment=request.environment,
        setup=request.setup,
    )


def build_stage_job(
    request: JobRequest,
    stage: str,
    arguments: Sequence[str],
    folder: Path,
    *,
    is_first: bool = False,
) -> BatchJob:
    """The batch job of one stage of several, with the resources and the name of the stage."""
    job = build_job(request, stage, arguments, folder)
    resources = compute_stage_resources(
        request.resources,
        stage,
        request.stage_options,
        cpu_partition=request.cpu_partition,
        is_first=is_first,
    )
    name = f"{request.name}-{stage}" if request.name else job.name
    return dataclasses.replace(job, resources=resources, name=name)
