"""The files about jobs in a run's folder, and SLURM's word on them. They suffice to find the jobs again another day.

RUN/job.sbatch              the batch file last submitted; `sbatch RUN/job.sbatch` submits it again
RUN/jobs/ID.json            what was submitted, when, by whom, with which command
RUN/jobs/ID.state.json      how it goes: starts, nodes, last step, ending; written by the job itself
RUN/jobs/ID_0_log.out       its log (named as submitit names them)
"""

import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from liverseg_dist.files import write_json

from .arrays import expand_tasks

FINAL = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
)
SCONTROL_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Submission:
    """A job as it was handed over. `array`: the indices' specification, e.g. 0-4, or empty."""

    job_id: str
    name: str
    command: list[str]
    cluster: str = "slurm"
    array: str = ""
    log: str = ""
    submitted: str = ""
    by: str = ""
    after: str = ""

    @property
    def tasks(self) -> list[str]:
        """Ids of the array's tasks, or the job's own."""
        return expand_tasks(self.job_id, self.array)


@dataclass(frozen=True)
class JobState:
    """What a job told of itself. `mark` measures the work done, `idle` counts restarts that did not raise it."""

    job_id: str
    name: str = ""
    starts: int = 0
    state: str = "running"
    nodes: list[str] = field(default_factory=list)
    mark: int = 0
    idle: int = 0
    message: str = ""


class JobFolder:
    """`jobs/` of a run (or of a store)."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.path = run / "jobs"

    @property
    def batch_file(self) -> Path:
        return self.run / "job.sbatch"

    def write_submission(self, submission: Submission) -> None:
        _write_json(self.path / f"{submission.job_id}.json", asdict(submission))

    def submissions(self) -> list[Submission]:
        """Oldest first."""
        found = [
            _read(path, Submission)
            for path in self.path.glob("*.json")
            if not path.name.endswith(".state.json")
        ]
        return sorted((s for s in found if s is not None), key=lambda s: (s.submitted, s.job_id))

    def write_state(self, state: JobState) -> None:
        _write_json(self.path / f"{state.job_id}.state.json", asdict(state))

    def state(self, job_id: str) -> JobState | None:
        return _read(self.path / f"{job_id}.state.json", JobState)

    def states(self) -> dict[str, JobState]:
        found = (_read(path, JobState) for path in self.path.glob("*.state.json"))
        return {state.job_id: state for state in found if state is not None}

    def log(self, job_id: str) -> Path:
        return self.path / f"{job_id}_0_log.out"


def progress_mark(folder: Path) -> int:
    """Grows with the work that a restart would not repeat: checkpointed steps, scored or predicted cases, converted
    scans. Their number alone would not: what is done anew, with other weights or settings, takes the place of the old.
    """
    patterns = ("checkpoints", "fold_*/checkpoints", "trials/*/fold_*/checkpoints")
    homes = {home for pattern in patterns for home in folder.glob(pattern)}
    steps = sum(
        max((_number(path.name) for path in home.glob("step_*")), default=0) for home in homes
    )
    ledgers = ("ledger", "evaluation/**/ledger", "fold_*/evaluation/**/ledger", ".liverseg/records")
    found = {path for pattern in ledgers for path in folder.glob(f"{pattern}/*.json")}
    done_ms = [changed_ms for path in found if (changed_ms := _done_ms(path))]
    return steps + len(done_ms) + max(done_ms, default=0)


def _done_ms(path: Path) -> int:
    """When a case was scored, or a scan settled; 0 for a failure, which each start tries again and writes anew."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        done = entry.get("error", "") is None or entry.get("final") is True
        return path.stat().st_mtime_ns // 1_000_000 if done else 0
    except (OSError, ValueError, AttributeError):
        return 0


def newest_step(folder: Path) -> int:
    return max((_number(path.name) for path in folder.glob("checkpoints/step_*")), default=0)


def run_status(run: Path) -> dict[str, Any]:
    """The run's own `status.json` (state, step, max_steps); empty when there is none."""
    try:
        return dict(json.loads((run / "status.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def controller_says(job_id: str) -> dict[str, str]:
    """`JobState`, `Reason`, ... of a job; empty when the controller does not know it. Raises OSError if silent."""
    done = subprocess.run(
        ["scontrol", "show", "job", "-o", job_id],
        capture_output=True,
        text=True,
        timeout=SCONTROL_TIMEOUT_S,
    )
    if done.returncode and "Invalid job id" in done.stderr:
        return {}
    if done.returncode:
        raise OSError(f"slurmctld does not answer: {done.stderr.strip()}")
    return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)


def slurm_states(job_ids: Iterable[str]) -> dict[str, str]:
    """State of each job or array task, from the queue and then from accounting; unknown ones are left out."""
    wanted = sorted({job_id.split("_")[0] for job_id in job_ids})
    if not wanted:
        return {}
    names = ",".join(wanted)
    old = _rows("sacct", "-X", "-n", "-P", "-j", names, "-o", "JobID,State")
    found = {row[0]: row[1].split()[0] for row in old if len(row) == 2 and row[1]}
    # The queue is fresher than accounting. %i of a pending array is 12_[0-4]; -r gives a row per task.
    new = _rows("squeue", "-h", "-r", "-t", "all", "-j", names, "-o", "%i|%T|%r")
    for row in (row for row in new if len(row) == 3):
        found[row[0]] = f"{row[1]} ({row[2]})" if row[1] == "PENDING" else row[1]
    return found


def expand_hostnames(nodelist: str) -> list[str]:
    """`node[1-2]` -> ["node1", "node2"]."""
    done = subprocess.run(
        ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def _rows(*command: str) -> list[list[str]]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SCONTROL_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip().split("|") for line in done.stdout.splitlines() if line.strip()]


def _number(name: str) -> int:
    digits = name.removeprefix("step_")
    return int(digits) if digits.isdigit() else 0


def _read(path: Path, kind: Any) -> Any:
    """None for a file that is absent or of no use."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return kind(**{f.name: content[f.name] for f in fields(kind) if f.name in content})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write_json(path: Path, content: dict[str, Any] | Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
