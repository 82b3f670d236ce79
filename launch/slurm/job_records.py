"""The files about jobs in the folder of a run, and the state of the jobs according to SLURM.

The files are enough to find the jobs again on another day.

RUN/job.sbatch              the batch file last submitted; `sbatch RUN/job.sbatch` submits it again
RUN/jobs/ID.json            what was submitted, when, by which user, with which command
RUN/jobs/ID.state.json      starts, nodes, last step, ending; written by the job itself
RUN/jobs/ID_0_log.out       its log (submitit's file name)
"""

import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from liverseg_dist.files import write_json

from .arrays import expand_tasks

FINAL_STATES = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
)
"""SLURM's states of a job that has ended."""
SCONTROL_TIMEOUT_S = 60.0
CHECKPOINT_FOLDERS = ("checkpoints", "fold_*/checkpoints", "trials/*/fold_*/checkpoints")
LEDGER_FOLDERS = (
    "ledger",
    "evaluation/**/ledger",
    "fold_*/evaluation/**/ledger",
    ".liverseg/records",
)


@dataclass(frozen=True)
class Submission:
    """A submitted job. The fields are the keys of the file."""

    job_id: str
    name: str
    command: list[str]
    cluster: str = "slurm"
    array: str = ""
    """The index list, e.g. 0-4; empty: no array."""
    log: str = ""
    submitted: str = ""
    by: str = ""
    after: str = ""

    @property
    def tasks(self) -> list[str]:
        """Ids of the tasks of the array, or the id of the job."""
        return expand_tasks(self.job_id, self.array)


@dataclass(frozen=True)
class JobState:
    """The state that a job wrote about itself. The fields are the keys of the file."""

    job_id: str
    name: str = ""
    starts: int = 0
    state: str = "running"
    nodes: list[str] = field(default_factory=list)
    mark: int = 0
    """The progress at the start, see `measure_progress`."""
    idle: int = 0
    """The number of restarts in a row that did not raise `mark`."""
    message: str = ""


class JobRecords:
    """The job files of a run (or of a store)."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.path = run / "jobs"

    @property
    def batch_file(self) -> Path:
        return self.run / "job.sbatch"

    def write_submission(self, submission: Submission) -> None:
        _write_json(self.path / f"{submission.job_id}.json", asdict(submission))

    def read_submissions(self) -> list[Submission]:
        """All submissions, oldest first."""
        found: list[Submission] = []
        for path in self.path.glob("*.json"):
            # A state is written by the job itself, not at submission.
            if path.name.endswith(".state.json"):
                continue
            submission = _read_record(path, Submission)
            if submission is not None:
                found.append(submission)
        return sorted(found, key=lambda one: (one.submitted, one.job_id))

    def write_state(self, state: JobState) -> None:
        _write_json(self.path / f"{state.job_id}.state.json", asdict(state))

    def read_state(self, job_id: str) -> JobState | None:
        return _read_record(self.path / f"{job_id}.state.json", JobState)

    def read_states(self) -> dict[str, JobState]:
        """Job id -> state, of all jobs."""
        found: dict[str, JobState] = {}
        for path in self.path.glob("*.state.json"):
            state = _read_record(path, JobState)
            if state is not None:
                found[state.job_id] = state
        return found

    def log_path(self, job_id: str) -> Path:
        return self.path / f"{job_id}_0_log.out"


def measure_progress(folder: Path) -> int:
    """A number that grows with the work that a restart does not repeat.

    It counts checkpointed steps, scored or predicted cases and converted scans. The time of the
    newest of them is added, because a case that is scored again with other weights or settings
    replaces the earlier one, so that their number stays the same.
    """
    steps = 0
    for checkpoints in _glob_all(folder, CHECKPOINT_FOLDERS):
        steps += _find_newest_step(checkpoints)
    done_ms = []
    for path in _glob_all(folder, [f"{pattern}/*.json" for pattern in LEDGER_FOLDERS]):
        changed_ms = _read_completion_ms(path)
        if changed_ms:
            done_ms.append(changed_ms)
    return steps + len(done_ms) + max(done_ms, default=0)


def _glob_all(folder: Path, patterns: Sequence[str]) -> set[Path]:
    found: set[Path] = set()
    for pattern in patterns:
        found.update(folder.glob(pattern))
    return found


def _read_completion_ms(path: Path) -> int:
    """When a case was scored or a scan was converted, in ms.

    0 for a failure: each start tries it again and writes its file again.
    """
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        is_done = entry.get("error", "") is None or entry.get("final") is True
        return path.stat().st_mtime_ns // 1_000_000 if is_done else 0
    except (OSError, ValueError, AttributeError):
        return 0


def find_newest_step(run: Path) -> int:
    """The step of the newest checkpoint of a run; 0 without one."""
    return _find_newest_step(run / "checkpoints")


def _find_newest_step(checkpoints: Path) -> int:
    steps = [_parse_step(path.name) for path in checkpoints.glob("step_*")]
    return max(steps, default=0)


def _parse_step(name: str) -> int:
    digits = name.removeprefix("step_")
    return int(digits) if digits.isdigit() else 0


def read_run_status(run: Path) -> dict[str, Any]:
    """The `status.json` of a run (state, step, max_steps); empty when there is none."""
    try:
        return dict(json.loads((run / "status.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def query_job(job_id: str) -> dict[str, str]:
    """`JobState`, `Reason`, ... of a job from SLURM's controller.

    Returns:
        The fields; empty when the controller has no such job.

    Raises:
        OSError: The controller does not answer.
    """
    done = subprocess.run(
        ["scontrol", "show", "job", "-o", job_id],
        capture_output=True,
        text=True,
        timeout=SCONTROL_TIMEOUT_S,
    )
    # SLURM forgets a job some minutes after its end.
    if done.returncode and "Invalid job id" in done.stderr:
        return {}
    if done.returncode:
        raise OSError(f"slurmctld does not answer: {done.stderr.strip()}")
    return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)


def query_job_states(job_ids: Iterable[str]) -> dict[str, str]:
    """State of each job or array task, from accounting and from the queue.

    Jobs that neither has are omitted.
    """
    wanted = sorted({job_id.split("_")[0] for job_id in job_ids})
    if not wanted:
        return {}
    names = ",".join(wanted)
    found: dict[str, str] = {}
    for row in _run_table("sacct", "-X", "-n", "-P", "-j", names, "-o", "JobID,State"):
        if len(row) == 2 and row[1]:
            found[row[0]] = row[1].split()[0]
    # The queue is newer than accounting. %i of a pending array is 12_[0-4]; -r prints a row per
    # task.
    for row in _run_table("squeue", "-h", "-r", "-t", "all", "-j", names, "-o", "%i|%T|%r"):
        if len(row) == 3:
            found[row[0]] = f"{row[1]} ({row[2]})" if row[1] == "PENDING" else row[1]
    return found


def expand_hostnames(nodelist: str) -> list[str]:
    """`node[1-2]` -> ["node1", "node2"]."""
    done = subprocess.run(
        ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def _run_table(*command: str) -> list[list[str]]:
    """The rows that a SLURM command prints; none if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SCONTROL_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip().split("|") for line in done.stdout.splitlines() if line.strip()]


def _read_record(path: Path, record_type: Any) -> Any:
    """The record in a file; None if the file is absent or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        # Unknown keys may come from another version; they are ignored.
        known = {f.name: content[f.name] for f in fields(record_type) if f.name in content}
        return record_type(**known)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write_json(path: Path, content: dict[str, Any] | Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
