"""One fold of a trial: the ordinary trainer in processes of its own, up to a step. Runs wherever Ray places it.

When the process that watches the trainer dies, the trainer gets SIGTERM, saves and stops (torchrun ends its ranks). It
inherits a lock, so that the next attempt waits until the folder is free. A fold over several nodes has such a process
on each; the first one, which runs `run_fold`, has the others started by `elsewhere` and ends when one of them is lost.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liverseg_dist.errors import EXIT_DONE, EXIT_USER
from liverseg_dist.locks import open_lock, take_lock

LOCK_TIMEOUT_S = 600.0
GRACE_S = 60.0
"""After the loss of another node's ranks the own ones have this long to find out and to say so."""
POLL_S = 0.2
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class FoldJob:
    """What a fold needs to know; plain values, as it travels to other nodes."""

    trial: str
    """The trial's folder, with its config.yaml."""
    fold: int
    nodes: int
    cpus: int
    """This and the next two: on each node."""
    gpus: float
    processes: int
    weights: dict[str, float]
    max_failures: int

    @property
    def folder(self) -> Path:
        return Path(self.trial) / f"fold_{self.fold}"

    def beside(self, part: int, suffix: str) -> Path:
        """The lock or the log of what runs on one of the nodes."""
        return self.folder.with_suffix(f".part{part}{suffix}" if part else suffix)


@dataclass(frozen=True)
class RemoteRanks:
    """A fold's ranks on other nodes."""

    master: str = ""
    """host:port at which all meet; empty: there are no others."""
    lost: Callable[[], bool] = lambda: False
    """Whether some have failed."""


Elsewhere = Callable[[FoldJob, int], AbstractContextManager[RemoteRanks]]


def run_on_one_node(_job: FoldJob, _step: int) -> AbstractContextManager[RemoteRanks]:
    return contextlib.nullcontext(RemoteRanks())


def run_fold(job: FoldJob, step: int, elsewhere: Elsewhere = run_on_one_node) -> dict[str, Any]:
    """Train to `step` unless it is done already: {"score", "liver", ..., "seconds"}, or {"failed": reason}."""
    reason = ""
    begun = time.monotonic()
    with _locked(job.beside(0, ".lock")) as lock:
        for _ in range(job.max_failures + 1):
            scores = read_scores(job, step)
            if scores is not None:
                return {**scores, "seconds": time.monotonic() - begun}
            with elsewhere(job, step) as others:
                code = _train(job, step, lock, 0, others)
            if code != EXIT_DONE:
                reason = f"fold {job.fold}: {_reason(job, code)}"
            elif read_scores(job, step) is None:
                reason = f"fold {job.fold}: no validation Dice at step {step}; has the fold validation cases?"
            if code == EXIT_USER:
                break
        scores = read_scores(job, step)
    return {"failed": reason} if scores is None else {**scores, "seconds": time.monotonic() - begun}


def run_part(job: FoldJob, step: int, master: str, part: int) -> int:
    """The ranks of one of the other nodes; their torchrun's exit code."""
    with _locked(job.beside(part, ".lock")) as lock:
        return _train(job, step, lock, part, RemoteRanks(master))


def read_scores(job: FoldJob, step: int) -> dict[str, float] | None:
    """The fold's validation at `step`, and what was measured up to there, if the run is safely past it."""
    try:
        status = json.loads((job.folder / "status.json").read_text(encoding="utf-8"))
        lines = (job.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    # A running training writes its step before that step is saved; only a saved one is reached for good.
    reached = status.get("saved_step", status["step"])
    if reached < step or (status["state"] == "failed" and status["step"] == step):
        return None
    figures: dict[str, float] = {}
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if record.get("step", step + 1) > step:
                continue
            figures |= {name: record[key] for key, name in MEASURED.items() if key in record}
            if record["step"] == step and "validation/score" in record:
                scores = _score(record, job.weights)
                return scores and {**scores, **figures}
    return None


MEASURED = {
    "memory/host_gib": "memory_gib",
    "memory/gpu_gib": "memory_gib",
    "speed/step_s_median": "step_s",
}
"""Of rank 0, as the trainer logs it; the GPU's memory where there is one."""


def _score(record: dict[str, float], weights: dict[str, float]) -> dict[str, float] | None:
    dice = {
        name: record[f"validation/dice_{name}"]
        for name in weights
        if f"validation/dice_{name}" in record
    }
    total = sum(weights[name] for name in dice)
    if total <= 0:
        return None
    return {"score": sum(weights[name] * value for name, value in dice.items()) / total, **dice}


def training_command(job: FoldJob, step: int, part: int = 0, master: str = "") -> list[str]:
    """The same line a person would type."""
    launcher = [sys.executable]
    if job.nodes > 1 or job.processes > 1:
        meeting = [
            "--rdzv-backend=liverseg",
            f"--rdzv-endpoint={master or 'localhost:0'}",
            f"--rdzv-conf=rank={part}",
        ]
        launcher += ["-m", "torch.distributed.run", f"--nnodes={job.nodes}", *meeting]
        launcher += [f"--nproc-per-node={job.processes}"]
    return [
        *launcher, "-m", "liverseg_dist", "train", "--json", "--device", "cuda" if job.gpus else "cpu",
        "--config", f"{job.trial}/config.yaml", f"data.fold={job.fold}", f"run.dir={job.folder}",
        f"train.stop_at_step={step}", f"train.threads={threads_per_process(job)}",
    ]  # fmt: skip


def threads_per_process(job: FoldJob) -> int:
    return max(1, job.cpus // job.processes)


def fold_environment(job: FoldJob) -> dict[str, str]:
    """Without what a launcher left in it: the fold is a world of its own. GPUs stay as Ray has shared them out."""
    strangers = (
        "SLURM_",
        "PMI",
        "TORCHELASTIC",
        "RANK",
        "LOCAL_",
        "WORLD_SIZE",
        "MASTER_",
        "GROUP_",
        "ROLE_",
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(strangers)}
    return {**kept, "OMP_NUM_THREADS": str(threads_per_process(job))}


def _train(job: FoldJob, step: int, lock: int, part: int, others: RemoteRanks) -> int:
    with job.beside(part, ".log").open("ab") as log:
        process = subprocess.Popen(
            training_command(job, step, part, others.master),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=fold_environment(job),
            pass_fds=(lock,),
            preexec_fn=_die_with_parent,
            start_new_session=True,
        )
        try:
            end = float("inf")
            while process.poll() is None and time.monotonic() < end:
                time.sleep(POLL_S)
                if end == float("inf") and others.lost():
                    end = time.monotonic() + GRACE_S
        finally:
            if process.poll() is None:
                _end(process)
        return process.returncode


def _die_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes], patience_s: float = 30.0) -> None:
    """SIGTERM lets the trainer save; who does not end is killed with its ranks."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The trainer's processes inherit the lock, so it is free only when all of them are gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = open_lock(path)
    try:
        end = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                take_lock(number, wait=False)  # on a file system without locks: at once
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"{path}: processes of an earlier attempt have not ended"
                    ) from None
                time.sleep(0.2)
        yield number
    finally:
        os.close(number)


def some_fold_runs(sweep: Path) -> bool:
    """Whether processes hold the lock of any fold (or part of one) in the sweep's folder, or could without a trace."""
    return any(_is_held(path) for path in sweep.glob("trials/*/fold_*.lock"))


def _is_held(path: Path) -> bool:
    number = open_lock(path)
    try:
        return not take_lock(number, wait=False)
    except BlockingIOError:
        return True
    finally:
        os.close(number)


def _reason(job: FoldJob, code: int) -> str:
    """The trainer's own last word, from its logs: on one of the nodes it has told what failed."""
    logs = [path for part in range(job.nodes) if (path := job.beside(part, ".log")).is_file()]
    text = "\n".join(
        path.read_text(encoding="utf-8", errors="replace")[-20_000:] for path in reversed(logs)
    )
    lines = text.splitlines()
    words = [line for line in lines if line.startswith("liverseg:") or '"error":' in line]
    last = next((line for line in reversed(words) if line.startswith("liverseg:")), "")
    if not last:
        last = next(
            (line.strip() for line in reversed(lines) if line.strip()), "no word in its log"
        )
    return f"exit code {code}: {last.removeprefix('liverseg: ')[:300]}"
