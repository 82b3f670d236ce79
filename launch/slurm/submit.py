"""Hands a plan over to SLURM, this machine or this process, and keeps what one needs to find it again another day."""

import argparse
import dataclasses
import getpass
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from liverseg_dist.commands.main import main
from liverseg_dist.errors import EXIT_DONE, RunFailed, UserError

from .. import PROGRAM
from .arrays import parse_array, parse_indices
from .code_snapshot import snapshot_path, take_snapshot
from .executors import local_words, run_in_this_process, start_here, submit_to_slurm
from .frozen_inputs import find_setup_file, freeze_configs
from .job_graph import JobRequest, JobStep, plan_jobs
from .job_records import JobFolder, Submission
from .launch_options import LEARNS
from .sbatch import BatchJob, Resources, render_batch_file
from .stages import check_stages, parse_stage_options
from .status import follow_jobs
from .units import time_seconds

NODE_LOCAL = ("/tmp/", "/var/tmp/", "/dev/shm/", "/run/")  # refused  # nosec B108


def submit_command(
    args: argparse.Namespace, resources: Resources, command: str, arguments: Sequence[str]
) -> int:
    """Returns the exit code. Raises `UserError` before anything is submitted."""
    stage_options = parse_stage_options(args.stage_option, args.convert_sbatch)
    if command == "train" and args.array is not None:
        check_stages(stage_options, ("train", "evaluate", "aggregate"))
    request = JobRequest(
        command=command,
        arguments=tuple(arguments),
        resources=resources,
        folder=args.folder,
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
    steps = plan_jobs(request)
    if args.cluster == "debug":
        return _debug(request, steps)
    steps = [_frozen(step, write=not args.dry_run) for step in steps]
    if args.dry_run:
        print(_local_commands(steps) if args.cluster == "local" else _texts(steps), end="")
        _warn_without_gpus(args, request)
        return EXIT_DONE
    if args.cluster == "local":
        return _here(steps, follow_it=args.follow)
    folder, job_ids = steps[0].job.folder, _submit_all(steps)
    _tell(steps, job_ids, parsable=args.parsable)
    _warn_without_gpus(args, request)
    return follow_jobs(folder, job_ids) if args.follow else EXIT_DONE


def _warn_without_gpus(args: argparse.Namespace, request: JobRequest) -> None:
    """Training on CPU nodes is rarely intended, and slow enough to waste days."""
    words = " ".join(request.arguments).replace("=", " ")
    on_purpose = args.gpus_are_chosen or "--device cpu" in words
    if request.command in LEARNS and args.cluster == "slurm" and not on_purpose:
        print(
            f"warning: {request.command} requests no GPU, so it trains on CPU cores; "
            "add --gpus-per-node N, or --cpu to confirm",
            file=sys.stderr,
        )


def _submit_all(steps: Sequence[JobStep]) -> list[str]:
    """Job ids in the plan's order; each waits for the one it follows. Refused in the middle, none is left behind."""
    job_ids: list[str] = []
    for step in steps:
        job = step.job
        if step.waits_for:
            job = dataclasses.replace(job, after=f"{step.how}:{job_ids[-step.waits_for]}")
        text = render_batch_file(job)
        try:
            job_ids.append(submit_to_slurm(job, text))
        except RunFailed:
            if job_ids:
                subprocess.run(["scancel", *job_ids], capture_output=True)
            raise
        record_submission(job, job_ids[-1], "slurm", text)
    return job_ids


def record_submission(job: BatchJob, job_id: str, cluster: str, text: str = "") -> None:
    """The records of a job that was handed over; `text` becomes its batch file, to submit again by hand."""
    folder = JobFolder(job.folder)
    if text:  # by hand, nobody waits for a job of long ago
        text = re.sub(
            r"^#SBATCH --(dependency|kill-on-invalid-dep)=.*\n", "", text, flags=re.MULTILINE
        )
        job.file.write_text(text, encoding="utf-8")
    log = str(job.log).replace("%j", job_id).replace("%A", job_id)
    folder.write_submission(
        Submission(
            job_id=job_id,
            name=job.name,
            command=list(job.module),
            cluster=cluster,
            array=job.array,
            log=log,
            submitted=datetime.now().astimezone().isoformat(timespec="seconds"),
            by=f"{getpass.getuser()}@{socket.gethostname()}",
            after=job.after,
        )
    )


def _frozen(step: JobStep, *, write: bool) -> JobStep:
    """The step with copies of code and configs, which `write` makes."""
    job = step.job
    if write:
        job.folder.mkdir(parents=True, exist_ok=True)
    code = take_snapshot(job.folder) if write else snapshot_path(job.folder)
    return dataclasses.replace(
        step, job=freeze_configs(dataclasses.replace(job, code=code), write=write)
    )


def _texts(steps: Sequence[JobStep]) -> str:
    """Every batch file; one that waits for another names it by its place in the plan."""
    texts = []
    for number, step in enumerate(steps):
        job = step.job
        if step.waits_for:
            job = dataclasses.replace(job, after=f"{step.how}:JOB_{number + 1 - step.waits_for}")
        texts.append(
            (f"# --- job {number + 1} of {len(steps)}\n" if len(steps) > 1 else "")
            + render_batch_file(job)
        )
    return "\n".join(texts)


def _tell(steps: Sequence[JobStep], job_ids: Sequence[str], *, parsable: bool) -> None:
    if parsable:
        print("\n".join(job_ids))
        return
    folder = steps[0].job.folder
    if str(folder).startswith(NODE_LOCAL):
        print(
            f"warning: {folder} looks local to this machine; compute nodes must see it",
            file=sys.stderr,
        )
    for step, job_id in zip(steps, job_ids, strict=True):
        after = (
            f", after {job_ids[job_ids.index(job_id) - step.waits_for]}" if step.waits_for else ""
        )
        tasks = f", tasks {step.job.array}" if step.job.array else ""
        print(f"job {job_id}: {step.job.name}{tasks}{after}")
    shown = shlex.quote(str(_short(folder)))
    print(f"watch: {PROGRAM} logs {shown} --follow   or: status {shown}   stop: cancel {shown}")


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _here(steps: Sequence[JobStep], *, follow_it: bool) -> int:
    """On this machine, one after the other where one waits for another."""
    tasks = [(step.job, index) for step in steps for index in _indices(step.job)]
    for number, (job, index) in enumerate(tasks):
        started = start_here(job, _minutes(job.resources.time), index)
        record_submission(dataclasses.replace(job, array=""), started.job_id, "local")
        print(
            f"{job.name} runs here as process {started.job_id}; its log: {started.paths.stdout}",
            flush=True,
        )
        if follow_it or number + 1 < len(tasks):
            process = started._process
            assert process is not None
            code = follow_jobs(job.folder, [started.job_id], process.poll)
            if code:
                return code
    return EXIT_DONE


def _local_commands(steps: Sequence[JobStep]) -> str:
    """What --cluster local would start, one command a line in the order of their start."""
    tasks = [(step.job, index) for step in steps for index in _indices(step.job)]
    return "".join(f"{shlex.join(local_words(job, index))}\n" for job, index in tasks)


def _indices(job: BatchJob) -> Sequence[int | None]:
    return parse_indices(job.array) if job.array else [None]


def _minutes(time: str) -> int:
    return max(1, time_seconds(time) // 60)


def _debug(request: JobRequest, steps: Sequence[JobStep]) -> int:
    job = steps[0].job
    if len(steps) > 1 or job.array or request.resources.ranks > 1 or job.launcher == "ray":
        raise UserError(
            "--cluster debug: runs one process of one command; use --cluster local for more"
        )
    os.chdir(job.workdir)
    return run_in_this_process(job.folder / "jobs", main, [request.command, *request.arguments])
