"""One fold of a trial: the ordinary trainer in its own processes, up to a step.

It runs where Ray places it. When the process that watches the trainer dies, the trainer gets
SIGTERM, saves and stops (torchrun ends its ranks). The trainer inherits a lock, so the next attempt
waits until the folder is free. A fold over several nodes has a watching process on each; the first
one, which runs `run_fold`, starts the others and ends when one of them is lost.
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
"""After the loss of the ranks on another node, the ranks of this node have this long to notice it
and to report it."""
STOP_TIMEOUT_S = 30.0
"""Time to save after SIGTERM; then the trainer is killed."""
POLL_S = 0.2
MAX_LOG_CHARACTERS = 20_000
MAX_REASON_CHARACTERS = 300
PR_SET_PDEATHSIG = 1
"""Constant of Linux's prctl."""
# Loaded at import, because nothing may be loaded between fork and exec.
_LIBC = ctypes.CDLL(None, use_errno=True)

FIGURES = {
    "memory/host_gib": "memory_gib",
    "memory/gpu_gib": "memory_gib",
    "speed/step_s_median": "step_s",
}
"""Metric of the trainer -> figure of the fold, of rank 0. GPU memory replaces that of the host."""
LAUNCHER_VARIABLES = (
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
"""Beginnings of environment variables of a launcher."""


@dataclass(frozen=True)
class FoldTask:
    """The work of one fold. It has plain values only, because it is sent to other nodes."""

    trial_dir: str
    """The folder of the trial, with its config.yaml."""
    fold: int
    nodes: int
    cpus: int
    """This and the next two: on each node."""
    gpus: float
    processes: int
    weights: dict[str, float]
    """Structure -> weight of its Dice in the score."""
    max_failures: int

    @property
    def folder(self) -> Path:
        return Path(self.trial_dir) / f"fold_{self.fold}"

    def part_file(self, part: int, suffix: str) -> Path:
        """The lock or the log of the processes on one of the nodes."""
        return self.folder.with_suffix(f".part{part}{suffix}" if part else suffix)


@dataclass(frozen=True)
class RemoteRanks:
    """The ranks of a fold on other nodes."""

    master: str = ""
    """host:port of the rendezvous; empty: there are no others."""
    have_failed: Callable[[], bool] = lambda: False
    """Whether some have failed."""


StartRemoteRanks = Callable[[FoldTask, int], AbstractContextManager[RemoteRanks]]


def start_no_remote_ranks(_task: FoldTask, _step: int) -> AbstractContextManager[RemoteRanks]:
    """For a fold on one node."""
    return contextlib.nullcontext(RemoteRanks())


def run_fold(
    task: FoldTask, step: int, start_remote_ranks: StartRemoteRanks = start_no_remote_ranks
) -> dict[str, Any]:
    """Train to `step`, unless that has been done.

    Args:
        task: The fold.
        step: The step to reach.
        start_remote_ranks: Starts the ranks on the other nodes of the fold.

    Returns:
        {"score", Dice by structure, "seconds", ...}, or {"failed": reason}.
    """
    reason = ""
    begun = time.monotonic()
    with _hold_lock(task.part_file(0, ".lock")) as lock:
        for _ in range(task.max_failures + 1):
            scores = read_scores(task, step)
            if scores is not None:
                return {**scores, "seconds": time.monotonic() - begun}
            with start_remote_ranks(task, step) as remote:
                code = _train(task, step, lock, 0, remote)
            if code != EXIT_DONE:
                reason = f"fold {task.fold}: {_find_reason(task, code)}"
            elif read_scores(task, step) is None:
                reason = (
                    f"fold {task.fold}: no validation Dice at step {step}; "
                    "check that the fold has validation cases"
                )
            # A mistake of the user would fail again.
            if code == EXIT_USER:
                break
        scores = read_scores(task, step)
    if scores is None:
        return {"failed": reason}
    return {**scores, "seconds": time.monotonic() - begun}


def run_remote_ranks(task: FoldTask, step: int, master: str, part: int) -> int:
    """Run the ranks on one of the other nodes.

    Args:
        task: The fold.
        step: The step to reach.
        master: host:port of the rendezvous.
        part: The number of this node.

    Returns:
        The exit code of torchrun.
    """
    with _hold_lock(task.part_file(part, ".lock")) as lock:
        return _train(task, step, lock, part, RemoteRanks(master))


def read_scores(task: FoldTask, step: int) -> dict[str, float] | None:
    """The validation of the fold at `step` and the figures measured up to it.

    Returns:
        {"score", Dice by structure, "memory_gib", "step_s"}; None if the run has not passed the step.
    """
    try:
        status = json.loads((task.folder / "status.json").read_text(encoding="utf-8"))
        lines = (task.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    # A training reports a step before it is saved; only a saved step cannot be lost.
    reached = status.get("saved_step", status["step"])
    if reached < step or (status["state"] == "failed" and status["step"] == step):
        return None
    figures: dict[str, float] = {}
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if record.get("step", step + 1) > step:
                continue
            for key, name in FIGURES.items():
                if key in record:
                    figures[name] = record[key]
            if record["step"] == step and "validation/score" in record:
                scores = _weight_dice(record, task.weights)
                return scores and {**scores, **figures}
    return None


def _weight_dice(record: dict[str, float], weights: dict[str, float]) -> dict[str, float] | None:
    """The weighted mean Dice as "score", and the Dice of each structure; None without any Dice."""
    dice: dict[str, float] = {}
    for name in weights:
        if f"validation/dice_{name}" in record:
            dice[name] = record[f"validation/dice_{name}"]
    total = sum(weights[name] for name in dice)
    if total <= 0:
        return None
    score = sum(weights[name] * value for name, value in dice.items()) / total
    return {"score": score, **dice}


def build_training_command(task: FoldTask, step: int, part: int = 0, master: str = "") -> list[str]:
    """The command line of the training of a fold, as a user would type it.

    Args:
        task: The fold.
        step: The step at which to stop.
        part: The number of this node.
        master: host:port of the rendezvous; empty: one node.
    """
    command = [sys.executable]
    if task.nodes > 1 or task.processes > 1:
        command += [
            "-m",
            "torch.distributed.run",
            f"--nnodes={task.nodes}",
            "--rdzv-backend=liverseg",
            f"--rdzv-endpoint={master or 'localhost:0'}",
            f"--rdzv-conf=rank={part}",
            f"--nproc-per-node={task.processes}",
        ]
    return [
        *command,
        "-m",
        "liverseg_dist",
        "train",
        "--json",
        "--device",
        "cuda" if task.gpus else "cpu",
        "--config",
        f"{task.trial_dir}/config.yaml",
        f"data.fold={task.fold}",
        f"run.dir={task.folder}",
        f"train.stop_at_step={step}",
        f"train.threads={count_threads(task)}",
    ]


def count_threads(task: FoldTask) -> int:
    """CPU threads of each process."""
    return max(1, task.cpus // task.processes)


def build_fold_environment(task: FoldTask) -> dict[str, str]:
    """The environment of a fold, without the variables of a launcher.

    The fold is a distributed world of its own. The GPUs stay those that Ray has assigned.
    """
    kept: dict[str, str] = {}
    for key, value in os.environ.items():
        if not key.startswith(LAUNCHER_VARIABLES):
            kept[key] = value
    return {**kept, "OMP_NUM_THREADS": str(count_threads(task))}


def _train(task: FoldTask, step: int, lock: int, part: int, remote: RemoteRanks) -> int:
    """Run the trainer to its end; returns its return code.

    Args:
        task: The fold.
        step: The step to reach.
        lock: Descriptor of the lock, which the trainer inherits.
        part: The number of this node.
        remote: The ranks on the other nodes.
    """
    # Appended, so that the log has all attempts.
    with task.part_file(part, ".log").open("ab") as log:
        process = subprocess.Popen(
            build_training_command(task, step, part, remote.master),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=build_fold_environment(task),
            pass_fds=(lock,),
            preexec_fn=_request_death_signal,
            # Ctrl-C in the terminal must reach the driver only; killpg then ends all ranks.
            start_new_session=True,
        )
        try:
            end = float("inf")
            while process.poll() is None and time.monotonic() < end:
                time.sleep(POLL_S)
                # These ranks will fail as well, with the message that names the reason.
                if end == float("inf") and remote.have_failed():
                    end = time.monotonic() + GRACE_S
        finally:
            if process.poll() is None:
                _stop_process(process)
        return process.returncode


def _request_death_signal() -> None:
    """Let the kernel send SIGTERM to this process when its parent dies."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop_process(process: subprocess.Popen[bytes]) -> None:
    """Let the trainer save; kill it and its ranks if it does not end in time."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def _hold_lock(path: Path) -> Iterator[int]:
    """Hold a lock during the block; yields its descriptor.

    The processes of the trainer inherit it, so it is free only when all of them have ended.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = open_lock(path)
    try:
        end = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                take_lock(descriptor, wait=False)  # returns at once where there are no locks
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"{path}: processes of an earlier attempt have not ended"
                    ) from None
                time.sleep(POLL_S)
        yield descriptor
    finally:
        os.close(descriptor)


def is_any_fold_running(sweep: Path) -> bool:
    """Whether processes hold the lock of any fold in the folder of the sweep.

    True also on a file system without locks, where they could run unnoticed.
    """
    return any(_is_locked(path) for path in sweep.glob("trials/*/fold_*.lock"))


def _is_locked(path: Path) -> bool:
    descriptor = open_lock(path)
    try:
        # False means a file system without locks.
        return not take_lock(descriptor, wait=False)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _find_reason(task: FoldTask, code: int) -> str:
    """Why the trainer failed, from the logs of all nodes."""
    lines: list[str] = []
    # The log of the first node comes last: its message is preferred.
    for part in reversed(range(task.nodes)):
        log = task.part_file(part, ".log")
        if log.is_file():
            text = log.read_text(encoding="utf-8", errors="replace")
            lines += text[-MAX_LOG_CHARACTERS:].splitlines()
    errors = [line for line in lines if line.startswith("liverseg:")]
    others = [line.strip() for line in lines if line.strip()]
    last = errors or others or ["its log is empty"]
    message = last[-1].removeprefix("liverseg: ")[:MAX_REASON_CHARACTERS]
    return f"exit code {code}: {message}"
