"""`launch status|logs|cancel RUN`: find the jobs of a run from its folder, also later or elsewhere.

python -m launch status runs/first runs/second [--json]
python -m launch logs runs/first [--job ID] [--follow] [--lines N]
python -m launch cancel runs/first [--job ID]
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from liverseg_dist.console import write_error, write_lines, write_notes
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, UserError
from liverseg_dist.streams import print_checked
from liverseg_dist.texts.paths import path_argument
from liverseg_dist.tracking.terminal_table import print_table

from .. import PROGRAM, name_programs
from .job_records import (
    FINAL_STATES,
    JobRecords,
    JobState,
    Submission,
    query_job_states,
    read_run_status,
)
from .option_parser import OneLineParser
from .option_values import positive_int

POLL_S = 2.0
DEFAULT_LINES = 40
NO_LOG_MESSAGE = "the log could not be opened: check that the node sees its folder"


@dataclass(frozen=True)
class JobStatus:
    """The state of one job, or of one task of an array."""

    job_id: str
    name: str
    state: str
    starts: int
    step: str
    message: str
    log: Path
    cluster: str

    @property
    def is_finished(self) -> bool:
        return self.state.split()[0] in (*FINAL_STATES, "DONE", "GONE")

    @property
    def is_successful(self) -> bool:
        return self.state.split()[0] in ("COMPLETED", "DONE")

    @property
    def array_id(self) -> str:
        """The id of the job without the task index."""
        return self.job_id.split("_")[0]


def build_parser(command: str) -> argparse.ArgumentParser:
    """The parser of status, logs or cancel."""
    parser = OneLineParser(
        prog=f"{PROGRAM} {command}",
        description=name_programs(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", type=path_argument, metavar="RUN", help="the folder of the run"
    )
    if command == "status":
        parser.add_argument("--json", action="store_true", help="one JSON list on the last line")
    else:
        parser.add_argument(
            "--job",
            metavar="ID",
            help="only this job or array task (default: all that have not ended)",
        )
    if command == "logs":
        parser.add_argument("--follow", action="store_true", help="wait until the jobs have ended")
        parser.add_argument(
            "--lines", type=positive_int, metavar="N", help=f"last N lines ({DEFAULT_LINES})"
        )
    return parser


def run(command: str, argv: Sequence[str]) -> int:
    """Run status, logs or cancel; returns the exit code. Raises `UserError`."""
    args = build_parser(command).parse_intermixed_args(argv)
    if command == "logs":
        if args.follow and args.lines is not None:
            raise UserError("--lines has no effect with --follow, which shows the whole log")
        args.lines = args.lines or DEFAULT_LINES
    for folder in args.runs:
        if not (folder / "jobs").is_dir():
            raise UserError(f"{folder}: no jobs/ in it; give the folder that has the job records")
    if command == "status":
        return _print_status(args)
    return _print_logs(args) if command == "logs" else _cancel_jobs(args)


def list_jobs(run_folder: Path) -> list[JobStatus]:
    """All jobs of a run, oldest first, also those that were submitted by hand."""
    records = JobRecords(run_folder)
    submissions, states = records.read_submissions(), records.read_states()
    for fold in run_folder.glob("fold_*"):
        states |= JobRecords(fold).read_states()
    recorded = {task for submission in submissions for task in submission.tasks}
    # A job submitted by hand has no record of its submission, only the state that it wrote itself.
    for state in states.values():
        if state.job_id not in recorded:
            log = str(records.log_path(state.job_id))
            submissions.append(Submission(state.job_id, state.name, [], log=log))
    slurm_tasks: list[str] = []
    for submission in submissions:
        if submission.cluster == "slurm":
            slurm_tasks += submission.tasks
    slurm_states = query_job_states(slurm_tasks)
    rows = []
    for submission in submissions:
        for task in submission.tasks:
            rows.append(_build_status(run_folder, submission, task, slurm_states, states.get(task)))
    return rows


def _build_status(
    run_folder: Path,
    submission: Submission,
    task: str,
    slurm_states: dict[str, str],
    own_state: JobState | None,
) -> JobStatus:
    """The status of one job or array task.

    Args:
        run_folder: The folder of the run.
        submission: The record of the submission.
        task: The id of the job or array task.
        slurm_states: Task id -> state according to SLURM.
        own_state: The state that the job wrote itself.
    """
    if submission.cluster == "local":
        state = _find_local_state(submission, own_state)
    else:
        state = slurm_states.get(task) or _convert_own_state(own_state)
    # For an array of folds the task index is the fold.
    index = task.rpartition("_")[2]
    log = Path(submission.log.replace("%a", index))
    fold = run_folder / f"fold_{index}"
    status = read_run_status(fold if "_" in task and fold.is_dir() else run_folder)
    step = ""
    if {"step", "max_steps"} <= status.keys():
        step = f"{status['step']}/{status['max_steps']}"
    message = own_state.message if own_state else ""
    if not message and state.split()[0] == "FAILED" and not log.exists():
        message = NO_LOG_MESSAGE
    return JobStatus(
        job_id=task,
        name=submission.name,
        state=state,
        starts=own_state.starts if own_state else 0,
        step=step,
        message=message,
        log=log,
        cluster=submission.cluster,
    )


def _convert_own_state(own_state: JobState | None) -> str:
    """A job state from what the job wrote itself; used where SLURM does not answer."""
    if own_state is None:
        return "UNKNOWN"
    names = {"done": "DONE", "failed": "FAILED", "requeued": "REQUEUED"}
    return names.get(own_state.state, f"{own_state.state.upper()}?")


def _find_local_state(submission: Submission, own_state: JobState | None) -> str:
    """The state of a job of `--cluster local`."""
    if submission.by.rpartition("@")[2] == socket.gethostname() and _is_alive(submission.job_id):
        return "RUNNING"
    ended = {"done": "DONE", "failed": "FAILED", "cancelled": "CANCELLED"}
    return ended.get(own_state.state, "GONE") if own_state else "GONE"


def _is_alive(job_id: str) -> bool:
    """Whether the local controller of submitit with this id runs on this machine."""
    # The ids are process ids, which are reused, so the command line is checked as well.
    with contextlib.suppress(OSError):
        return b"submitit" in Path(f"/proc/{job_id}/cmdline").read_bytes()
    return False


def _print_status(args: argparse.Namespace) -> int:
    """`launch status`: a table per run, and with --json all rows on the last line."""
    listing = []
    for run_folder in args.runs:
        rows = list_jobs(run_folder)
        write_lines(str(run_folder))
        _print_status_table(rows)
        for row in rows:
            listing.append(
                {
                    "run": str(run_folder),
                    "job_id": row.job_id,
                    "name": row.name,
                    "state": row.state,
                    "starts": row.starts,
                    "step": row.step,
                    "message": row.message,
                }
            )
    if shutil.which("squeue") is None:
        write_notes(
            "no SLURM on this machine: the states are the last that the jobs wrote themselves"
        )
    if args.json and (failure := print_checked(json.dumps(listing))):
        write_error(f"the result could not be written to stdout: {failure}", "launch")
        return EXIT_FAILED
    return EXIT_DONE


def _print_status_table(rows: Sequence[JobStatus]) -> None:
    if not rows:
        write_lines("  no job yet")
        return
    lines = []
    for row in rows:
        starts = f"start {row.starts}" if row.starts else ""
        lines.append((row.job_id, row.name, row.state, starts, row.step, row.message))
    headings = ("job", "name", "state", "starts", "step", "message")
    print_table(headings, lines, right=("job", "step"))


def _select_jobs(args: argparse.Namespace, run_folder: Path) -> list[JobStatus]:
    """The jobs of a run, or the one of --job. Raises `UserError` if the run does not have it."""
    found = list_jobs(run_folder)
    if args.job:
        found = [row for row in found if args.job in (row.job_id, row.array_id)]
        if not found:
            raise UserError(
                f"{run_folder}: has no job {args.job}; `launch status {run_folder}` lists them"
            )
    return found


def _cancel_jobs(args: argparse.Namespace) -> int:
    """`launch cancel`. The checkpoints stay: submitted again, the run continues."""
    code = EXIT_DONE
    for run_folder in args.runs:
        active = [row for row in _select_jobs(args, run_folder) if not row.is_finished]
        slurm_ids: set[str] = set()
        local_ids: list[str] = []
        for row in active:
            if row.cluster == "slurm":
                # The id of the array cancels all its tasks at once.
                slurm_ids.add(row.job_id if args.job else row.array_id)
            elif row.cluster == "local" and _is_alive(row.job_id):
                local_ids.append(row.job_id)
        if slurm_ids:
            done = subprocess.run(["scancel", *sorted(slurm_ids)], capture_output=True, text=True)
            write_notes(*done.stderr.splitlines())
            if done.returncode:
                code = EXIT_FAILED
        for job_id in local_ids:
            os.kill(int(job_id), signal.SIGTERM)
        cancelled = ", ".join([*sorted(slurm_ids), *local_ids]) or "nothing to cancel"
        write_lines(f"{run_folder}: {cancelled}")
    return code


def _print_logs(args: argparse.Namespace) -> int:
    """`launch logs`: the last lines of each log, or the whole logs as they grow."""
    code = EXIT_DONE
    for run_folder in args.runs:
        rows = _select_jobs(args, run_folder)
        if not args.job:
            rows = [row for row in rows if not row.is_finished] or rows[-1:]
        if args.follow:
            code = code or follow_jobs(run_folder, sorted({row.job_id for row in rows}))
            continue
        for row in rows:
            lines = [f"(none yet: {row.state})"]
            if row.log.exists():
                lines = row.log.read_text(encoding="utf-8", errors="replace").splitlines()
            write_lines(f"== {row.log}", *lines[-args.lines :])
    return code


def follow_jobs(
    run_folder: Path, job_ids: Sequence[str], poll: Callable[[], int | None] | None = None
) -> int:
    """Print states and logs until the jobs have ended.

    Args:
        run_folder: The folder of the run.
        job_ids: Ids of jobs or array tasks.
        poll: Returns the return code of a local process, or None while it runs.

    Returns:
        The exit code: 0 if all jobs were successful.
    """
    wanted = set(job_ids)
    offsets: dict[Path, int] = {}
    printed_states: dict[str, str] = {}
    while True:
        # Before the states are read, so that the last lines of the log are not missed.
        has_ended = poll is not None and poll() is not None
        rows = []
        for row in list_jobs(run_folder):
            if row.job_id in wanted or row.array_id in wanted:
                rows.append(row)
        for row in rows:
            if printed_states.get(row.job_id) != row.state:
                printed_states[row.job_id] = row.state
                write_lines(f"-- job {row.job_id} ({row.name}): {row.state}")
            prefix = f"{row.job_id}| " if len(rows) > 1 else ""
            offsets[row.log] = _print_new_lines(row.log, offsets.get(row.log, 0), prefix)
        if has_ended or (rows and all(row.is_finished for row in rows)):
            failed = [row for row in rows if not row.is_successful]
            for row in failed:
                write_lines(f"-- job {row.job_id}: {row.message or row.state}")
            return EXIT_FAILED if failed else EXIT_DONE
        time.sleep(POLL_S)


def _print_new_lines(log: Path, offset: int, prefix: str) -> int:
    """Print the complete lines after `offset`; returns the new offset."""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(offset)
        added = file.read()
        # A line that is still being written is printed next time.
        added = added[: added.rfind(b"\n") + 1]
        lines = added.decode(errors="replace").splitlines()
        write_lines(*(f"{prefix}{line}" for line in lines))
        return offset + len(added)
    return offset
