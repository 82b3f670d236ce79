"""Submits the jobs of a command to SLURM, to this machine or to this process.

Copies of code and configs, the batch file and the job records stay in the folder of the run, so
that the jobs can be found and submitted again later.
"""

import argparse
import dataclasses
import getpass
import logging
import os
import re
import shlex
import socket
import subprocess
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from liverseg_dist.commands.main import main
from liverseg_dist.console import write_lines
from liverseg_dist.errors import EXIT_DONE, RunFailed, UserError

from .. import PROGRAM
from .arrays import parse_array, parse_indices
from .code_snapshot import snapshot_path, write_snapshot
from .executors import build_local_command, run_in_this_process, start_locally, submit_to_slurm
from .frozen_inputs import find_setup_file, freeze_inputs
from .job_graph import plan_jobs
from .job_records import JobRecords, Submission
from .job_request import JobRequest, JobStep
from .option_rules import TRAINING_COMMANDS
from .sbatch import BatchJob, Resources, render_batch_file
from .stages import check_stages, parse_stage_options
from .status import follow_jobs
from .units import time_to_seconds

_logger = logging.getLogger(__name__)

NODE_LOCAL = ("/tmp/", "/var/tmp/", "/dev/shm/", "/run/")  # only compared  # nosec B108


def submit_command(
    args: argparse.Namespace, resources: Resources, command: str, arguments: Sequence[str]
) -> int:
    """Submit the jobs of a command.

    Args:
        args: The options of launch.
        resources: The resources of the job that runs the command.
        command: A liverseg command, tune or chain.
        arguments: The arguments of the command.

    Returns:
        The exit code.

    Raises:
        UserError: A mistake in the request; nothing has been submitted.
        RunFailed: SLURM refused a job; the jobs before it are cancelled.
    """
    request = _build_request(args, resources, command, arguments)
    steps = plan_jobs(request)
    if args.cluster == "debug":
        return _run_debug(request, steps)
    steps = [_freeze_step(step, write=not args.dry_run) for step in steps]
    if args.dry_run:
        if args.cluster == "local":
            write_lines(*_format_local_commands(steps))
        else:
            write_lines(_format_batch_files(steps).removesuffix("\n"))
        _warn_without_gpus(args, request)
        return EXIT_DONE
    if args.cluster == "local":
        return _run_locally(steps, follow_it=args.follow)
    job_ids = _submit_steps(steps)
    _print_job_ids(steps, job_ids, parsable=args.parsable)
    _warn_without_gpus(args, request)
    return follow_jobs(steps[0].job.folder, job_ids) if args.follow else EXIT_DONE


def _build_request(
    args: argparse.Namespace, resources: Resources, command: str, arguments: Sequence[str]
) -> JobRequest:
    """The options of launch as a request. Raises `UserError`."""
    stage_options = parse_stage_options(args.stage_option, args.convert_sbatch)
    if command == "train" and args.array is not None:
        check_stages(stage_options, ("train", "evaluate", "aggregate"))
    return JobRequest(
        command=command,
        arguments=tuple(arguments),
        resources=resources,
        folder=args.job_dir,
        name=args.name,
        array=parse_array(args.array) if args.array is not None else None,
        convert_tasks=parse_array(args.convert_tasks, "--convert-tasks"),
        stage_options=stage_options,
        cpu_partition=args.cpu_partition,
        environment=tuple(args.env),
        setup=find_setup_file(args.setup),
        launcher=args.launcher,
        after=args.after,
        restarts=args.restarts,
    )


def _warn_without_gpus(args: argparse.Namespace, request: JobRequest) -> None:
    """Warn about training on CPU nodes, which is rarely intended and can take days."""
    words = " ".join(request.arguments).replace("=", " ")
    is_intended = args.gpus_are_chosen or "--device cpu" in words
    if request.command in TRAINING_COMMANDS and args.cluster == "slurm" and not is_intended:
        _logger.warning(
            "%s requests no GPU, so it trains on CPU cores; "
            "add --gpus-per-node N, or --cpu to confirm",
            request.command,
        )


def _submit_steps(steps: Sequence[JobStep]) -> list[str]:
    """Submit the jobs in order; each waits for the one it depends on.

    Returns:
        The job ids in the order of the steps.

    Raises:
        RunFailed: SLURM refused a job; those already submitted are cancelled.
    """
    job_ids: list[str] = []
    for step in steps:
        job = step.job
        if step.waits_for:
            after = f"{step.dependency}:{job_ids[-step.waits_for]}"
            job = dataclasses.replace(job, after=after)
        text = render_batch_file(job)
        try:
            job_ids.append(submit_to_slurm(job, text))
        except RunFailed:
            # A part of the jobs would be useless: none stays in the queue.
            if job_ids:
                subprocess.run(["scancel", *job_ids], capture_output=True)
            raise
        record_submission(job, job_ids[-1], "slurm", text)
    return job_ids


def record_submission(job: BatchJob, job_id: str, cluster: str, text: str = "") -> None:
    """Write the records of a submitted job.

    Args:
        job: The job.
        job_id: Its id.
        cluster: slurm or local.
        text: The batch file, which is kept to submit the job again by hand; empty: none.
    """
    if text:
        # Submitted by hand, the job must not wait for a job of an earlier submission.
        text = re.sub(
            r"^#SBATCH --(dependency|kill-on-invalid-dep)=.*\n", "", text, flags=re.MULTILINE
        )
        job.file.write_text(text, encoding="utf-8")
    submission = Submission(
        job_id=job_id,
        name=job.name,
        command=list(job.module),
        cluster=cluster,
        array=job.array,
        # %a stays: each task of an array has its own log.
        log=str(job.log).replace("%j", job_id).replace("%A", job_id),
        submitted=datetime.now().astimezone().isoformat(timespec="seconds"),
        by=f"{getpass.getuser()}@{socket.gethostname()}",
        after=job.after,
    )
    JobRecords(job.folder).write_submission(submission)


def _freeze_step(step: JobStep, *, write: bool) -> JobStep:
    """The step with copies of code and configs; `write` makes the copies."""
    job = step.job
    if write:
        job.folder.mkdir(parents=True, exist_ok=True)
    # A dry run writes nothing, but names the folder.
    code = write_snapshot(job.folder) if write else snapshot_path(job.folder)
    job = freeze_inputs(dataclasses.replace(job, code=code), write=write)
    return dataclasses.replace(step, job=job)


def _format_batch_files(steps: Sequence[JobStep]) -> str:
    """All batch files; a dependency names the other job by its position."""
    texts = []
    for number, step in enumerate(steps, 1):
        job = step.job
        if step.waits_for:
            after = f"{step.dependency}:JOB_{number - step.waits_for}"
            job = dataclasses.replace(job, after=after)
        heading = f"# --- job {number} of {len(steps)}\n" if len(steps) > 1 else ""
        texts.append(heading + render_batch_file(job))
    return "\n".join(texts)


def _print_job_ids(steps: Sequence[JobStep], job_ids: Sequence[str], *, parsable: bool) -> None:
    """Print the submitted jobs, and how to watch and cancel them."""
    if parsable:
        write_lines(*job_ids)
        return
    folder = steps[0].job.folder
    if str(folder).startswith(NODE_LOCAL):
        _logger.warning(
            "%s seems to be local to this machine; the compute nodes must see it", folder
        )
    lines = []
    for number, (step, job_id) in enumerate(zip(steps, job_ids, strict=True)):
        after = f", after {job_ids[number - step.waits_for]}" if step.waits_for else ""
        tasks = f", tasks {step.job.array}" if step.job.array else ""
        lines.append(f"job {job_id}: {step.job.name}{tasks}{after}")
    shown = shlex.quote(str(_relative_to_cwd(folder)))
    write_lines(
        *lines,
        f"watch: {PROGRAM} logs {shown} --follow   or: status {shown}   stop: cancel {shown}",
    )


def _relative_to_cwd(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _run_locally(steps: Sequence[JobStep], *, follow_it: bool) -> int:
    """Run the jobs on this machine, one after the other; the first failure ends the sequence."""
    tasks = _list_tasks(steps)
    for number, (job, index) in enumerate(tasks, 1):
        started = start_locally(job, _to_minutes(job.resources.time), index)
        # On this machine each task is a job of its own.
        record_submission(dataclasses.replace(job, array=""), started.job_id, "local")
        write_lines(
            f"{job.name} runs on this machine as process {started.job_id}; "
            f"its log: {started.paths.stdout}"
        )
        if follow_it or number < len(tasks):
            process = started._process
            assert process is not None
            code = follow_jobs(job.folder, [started.job_id], process.poll)
            if code:
                return code
    return EXIT_DONE


def _format_local_commands(steps: Sequence[JobStep]) -> list[str]:
    """The commands that --cluster local would start, in this order."""
    lines = []
    for job, index in _list_tasks(steps):
        lines.append(shlex.join(build_local_command(job, index)))
    return lines


def _list_tasks(steps: Sequence[JobStep]) -> list[tuple[BatchJob, int | None]]:
    """Each job, or each task of its array with the index."""
    tasks: list[tuple[BatchJob, int | None]] = []
    for step in steps:
        if step.job.array:
            tasks += [(step.job, index) for index in parse_indices(step.job.array)]
        else:
            tasks.append((step.job, None))
    return tasks


def _to_minutes(time: str) -> int:
    """A time limit in SLURM's notation as whole minutes, at least one."""
    return max(1, time_to_seconds(time) // 60)


def _run_debug(request: JobRequest, steps: Sequence[JobStep]) -> int:
    """Run the command in this process. Raises `UserError` if it needs more than one."""
    job = steps[0].job
    if len(steps) > 1 or job.array or request.resources.ranks > 1 or job.launcher == "ray":
        raise UserError(
            "--cluster debug: runs one process of one command; use --cluster local for more"
        )
    # As the batch file does.
    os.chdir(job.workdir)
    return run_in_this_process(job.folder / "jobs", main, [request.command, *request.arguments])
