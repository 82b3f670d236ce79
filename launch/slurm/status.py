"""`launch status|logs|cancel RUN`: jobs found again from the run's folder alone, on another machine or day.

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
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, UserError
from liverseg_dist.streams import print_checked
from liverseg_dist.texts.paths import path_argument
from liverseg_dist.tracking.terminal_table import print_table

from .. import PROGRAM, name_programs
from .job_records import FINAL, JobFolder, JobState, Submission, run_status, slurm_states
from .launch_options import OneLineParser, positive

POLL_S = 2.0
LAST_LINES = 40
NO_LOG_EXIT = "the log could not be opened: does the node see its folder?"


@dataclass(frozen=True)
class JobRow:
    """One job, or one task of an array."""

    job_id: str
    name: str
    state: str
    starts: int
    step: str
    message: str
    log: Path
    cluster: str

    @property
    def is_over(self) -> bool:
        return self.state.split()[0] in (*FINAL, "DONE", "GONE")


def run(command: str, argv: Sequence[str]) -> int:
    parser = OneLineParser(
        prog=f"{PROGRAM} {command}",
        description=name_programs(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", type=path_argument, metavar="RUN", help="the run's folder"
    )
    if command == "status":
        parser.add_argument("--json", action="store_true", help="one JSON list on the last line")
    else:
        parser.add_argument(
            "--job",
            metavar="ID",
            help="only this job or array task (default: all that are not over)",
        )
    if command == "logs":
        parser.add_argument("--follow", action="store_true", help="stay until the jobs are over")
        parser.add_argument(
            "--lines", type=positive, metavar="N", help=f"last N lines ({LAST_LINES})"
        )
    args = parser.parse_intermixed_args(argv)
    if command == "logs":
        if args.follow and args.lines is not None:
            raise UserError("--lines has no effect with --follow, which shows the whole log")
        args.lines = args.lines or LAST_LINES
    for folder in args.runs:
        if not (folder / "jobs").is_dir():
            raise UserError(
                f"{folder}: no jobs/ here; give the folder that launch put its job files in"
            )
    if command == "status":
        return _status(args)
    return _logs(args) if command == "logs" else _cancel(args)


def list_jobs(run_folder: Path) -> list[JobRow]:
    """All jobs of a run, oldest first, also those that were submitted by hand."""
    folder = JobFolder(run_folder)
    submissions, states = folder.submissions(), folder.states()
    for fold in run_folder.glob("fold_*"):
        states |= JobFolder(fold).states()
    known = {task for submission in submissions for task in submission.tasks}
    by_hand = [
        Submission(s.job_id, s.name, [], log=str(folder.log(s.job_id)))
        for s in states.values()
        if s.job_id not in known
    ]
    everything = [*submissions, *by_hand]
    said = slurm_states(task for s in everything if s.cluster == "slurm" for task in s.tasks)
    return [
        _row(run_folder, s, task, said, states.get(task)) for s in everything for task in s.tasks
    ]


def _row(
    run_folder: Path, submission: Submission, task: str, said: dict[str, str], own: JobState | None
) -> JobRow:
    if submission.cluster == "local":
        state = _local_state(submission, own)
    else:
        state = said.get(task) or _last_known(own)
    log = Path(submission.log.replace("%a", task.rpartition("_")[2]))
    fold = run_folder / f"fold_{task.rpartition('_')[2]}"
    status = run_status(fold if "_" in task and fold.is_dir() else run_folder)
    step = (
        f"{status['step']}/{status['max_steps']}" if {"step", "max_steps"} <= status.keys() else ""
    )
    message = own.message if own else ""
    if not message and state.split()[0] == "FAILED" and not log.exists():
        message = NO_LOG_EXIT
    return JobRow(
        task,
        submission.name,
        state,
        own.starts if own else 0,
        step,
        message,
        log,
        submission.cluster,
    )


def _last_known(own: JobState | None) -> str:
    """Without SLURM at hand: what the job wrote about itself."""
    if own is None:
        return "UNKNOWN"
    return {"done": "DONE", "failed": "FAILED", "requeued": "REQUEUED"}.get(
        own.state, f"{own.state.upper()}?"
    )


def _local_state(submission: Submission, own: JobState | None) -> str:
    if submission.by.rpartition("@")[2] == socket.gethostname() and _alive(submission.job_id):
        return "RUNNING"
    ended = {"done": "DONE", "failed": "FAILED", "cancelled": "CANCELLED"}
    return ended.get(own.state, "GONE") if own else "GONE"


def _alive(job_id: str) -> bool:
    """Whether submitit's local controller of this id still runs here (ids are process ids, which are reused)."""
    with contextlib.suppress(OSError):
        return b"submitit" in Path(f"/proc/{job_id}/cmdline").read_bytes()
    return False


def _status(args: argparse.Namespace) -> int:
    found = {str(run_folder): list_jobs(run_folder) for run_folder in args.runs}
    for name, jobs in found.items():
        print(name)
        lines = []
        for row in jobs:
            starts = f"start {row.starts}" if row.starts else ""
            lines.append((row.job_id, row.name, row.state, starts, row.step, row.message))
        if jobs:
            print_table(
                ("job", "name", "state", "starts", "step", "message"), lines, right=("job", "step")
            )
        if not jobs:
            print("  no job yet")
    if shutil.which("squeue") is None:
        print("no SLURM here: states are the last that the jobs wrote themselves", file=sys.stderr)
    if args.json:
        keys = ("job_id", "name", "state", "starts", "step", "message")
        listing = [
            {"run": name, **{key: getattr(row, key) for key in keys}}
            for name in found
            for row in found[name]
        ]
        if failure := print_checked(json.dumps(listing)):
            print(f"launch: the result could not be written to stdout: {failure}", file=sys.stderr)
            return EXIT_FAILED
    return EXIT_DONE


def _chosen(args: argparse.Namespace, run_folder: Path) -> list[JobRow]:
    found = list_jobs(run_folder)
    if args.job:
        found = [row for row in found if args.job in (row.job_id, row.job_id.split("_")[0])]
        if not found:
            raise UserError(
                f"{run_folder}: has no job {args.job}; `launch status {run_folder}` lists them"
            )
    return found


def _cancel(args: argparse.Namespace) -> int:
    """Jobs are cancelled, not deleted: submitted again, the run continues."""
    code = EXIT_DONE
    for run_folder in args.runs:
        active = [row for row in _chosen(args, run_folder) if not row.is_over]
        slurm = sorted(
            {
                row.job_id if args.job else row.job_id.split("_")[0]
                for row in active
                if row.cluster == "slurm"
            }
        )
        if slurm:
            done = subprocess.run(["scancel", *slurm], capture_output=True, text=True)
            print(done.stderr, end="", file=sys.stderr)
            code = code or (EXIT_FAILED if done.returncode else EXIT_DONE)
        here = [row.job_id for row in active if row.cluster == "local" and _alive(row.job_id)]
        for job_id in here:
            os.kill(int(job_id), signal.SIGTERM)
        said = ", ".join([*slurm, *here]) or "nothing to cancel"
        print(f"{run_folder}: {said}")
    return code


def _logs(args: argparse.Namespace) -> int:
    code = EXIT_DONE
    for run_folder in args.runs:
        found = _chosen(args, run_folder)
        chosen = found if args.job else ([row for row in found if not row.is_over] or found[-1:])
        if args.follow:
            code = code or follow_jobs(run_folder, sorted({row.job_id for row in chosen}))
            continue
        for row in chosen:
            print(f"== {row.log}")
            if row.log.exists():
                text = row.log.read_text(encoding="utf-8", errors="replace").splitlines()
                print("\n".join(text[-args.lines :]))
            else:
                print(f"(none yet: {row.state})")
    return code


def follow_jobs(
    run_folder: Path, job_ids: Sequence[str], ended: Callable[[], int | None] | None = None
) -> int:
    """Show states and logs until the jobs are over; 0 if all went well. `ended`: a local process's poll."""
    wanted, shown, seen = set(job_ids), dict[Path, int](), dict[str, str]()
    while True:
        over = ended is not None and ended() is not None
        mine = [
            row
            for row in list_jobs(run_folder)
            if row.job_id in wanted or row.job_id.split("_")[0] in wanted
        ]
        for row in mine:
            if seen.get(row.job_id) != row.state:
                seen[row.job_id] = row.state
                print(f"-- job {row.job_id} ({row.name}): {row.state}", flush=True)
            shown[row.log] = _show(
                row.log, shown.get(row.log, 0), prefix=f"{row.job_id}| " if len(mine) > 1 else ""
            )
        if over or (mine and all(row.is_over for row in mine)):
            bad = [row for row in mine if row.state.split()[0] not in ("COMPLETED", "DONE")]
            for row in bad:
                print(f"-- job {row.job_id}: {row.message or row.state}", flush=True)
            return EXIT_FAILED if bad else EXIT_DONE
        time.sleep(POLL_S)


def _show(log: Path, offset: int, prefix: str) -> int:
    """Print what was added since `offset`, whole lines; returns the new offset."""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(offset)
        added = file.read()
        added = added[: added.rfind(b"\n") + 1]
        for line in added.decode(errors="replace").splitlines():
            print(f"{prefix}{line}")
        sys.stdout.flush()
        return offset + len(added)
    return offset
