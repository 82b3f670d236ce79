"""Executors of submitit that run a given batch file or command instead of a pickled function.

The batch file can be read, kept and submitted again by hand. All ranks save (not only rank 0), a
stopped job is requeued after its ranks have ended, so no process is left on a node, and nothing is
ever unpickled.
"""

import contextlib
import io
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import submitit
import torch
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.local.debug import DebugExecutor
from submitit.local.local import LocalExecutor, LocalJob

from liverseg_dist.errors import RunFailed, UserError

from .sbatch import BatchJob, build_local_task_command, build_supervisor_command, substitute_index


class BatchFileExecutor(submitit.SlurmExecutor):
    """Submits a given batch file. submitit's job object provides state, log and cancellation."""

    def __init__(self, folder: Path, text: str) -> None:
        super().__init__(folder)
        self.text = text

    @classmethod
    def affinity(cls) -> int:
        # submitit's own check looks for srun; a login node needs only sbatch.
        return 2

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.text


def submit_to_slurm(job: BatchJob, text: str) -> str:
    """Submit a batch file.

    Args:
        job: The job, whose folder keeps the records of submitit.
        text: The batch file.

    Returns:
        The id of the job.

    Raises:
        UserError: This machine has no SLURM.
        RunFailed: SLURM refused the job; the message has its reason.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "no sbatch on this machine: submit from a login node of the cluster, "
            "or use --cluster local"
        )
    folder = job.folder / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # submitit prints to stderr what the exception contains as well.
        with contextlib.redirect_stderr(io.StringIO()):
            return str(BatchFileExecutor(folder, text)._submit_command("").job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line for line in str(error).splitlines() if line.startswith("sbatch: ")]
        reason = "; ".join(lines or [" ".join(str(error).split())])[:400]
        reason = reason.replace("sbatch: error: ", "")
        raise RunFailed(f"SLURM refused the job: {reason}") from None


def start_locally(job: BatchJob, minutes: int, index: int | None = None) -> LocalJob:
    """Start the job in the background of this machine.

    It is supervised as under SLURM: time limit, restarts, the same log.

    Args:
        job: The job to start.
        minutes: Its time limit.
        index: The task of an array to start.

    Raises:
        UserError: The job needs more nodes or GPUs than this machine has.
    """
    requested, present = job.resources.gpus_per_node, torch.cuda.device_count()
    if requested > present:
        raise UserError(
            f"--cluster local: --gpus-per-node {requested}, but this machine has {present}"
        )
    command = build_local_command(job, index)
    executor = LocalExecutor(job.folder / "jobs")
    executor.update_parameters(
        timeout_min=minutes,
        # At most half of a short time limit.
        signal_delay_s=min(job.resources.signal_s, 30 * minutes),
        gpus_per_node=job.resources.gpus_per_node,
        stderr_to_stdout=True,
    )
    started: LocalJob = executor._submit_command(shlex.join(command))
    return started


def build_local_command(job: BatchJob, index: int | None = None) -> list[str]:
    """The supervised command line of a job, or of one task of an array, on this machine."""
    if job.resources.nodes > 1:
        raise UserError("--cluster local: this machine is one node; omit --nodes")
    command = [*build_supervisor_command(job), *build_local_task_command(job)]
    if index is not None:
        command = substitute_index(command, index)
    environment = [f"LIVERSEG_JOB_NAME={job.name}", *job.environment]
    # PYTHONSAFEPATH: otherwise Python would prefer the working directory to the snapshot.
    if job.code is not None:
        environment += [f"PYTHONPATH={job.code}", "PYTHONSAFEPATH=1"]
    command = ["env", "-C", str(job.workdir), *environment, *command]
    if job.setup is None:
        return command
    # exec, so that signals reach the supervisor and not the shell.
    return ["bash", "-c", 'source "$0" && exec "$@"', str(job.setup), *command]


def run_in_this_process(
    folder: Path, function: Callable[[list[str]], int], arguments: list[str]
) -> int:
    """Run `--cluster debug`: in this process, so that breakpoint() works."""
    # A shell inside an allocation has it, and the command would wait for other ranks.
    os.environ.pop("SLURM_STEP_NUM_TASKS", None)
    return int(DebugExecutor(folder).submit(function, arguments).result())
