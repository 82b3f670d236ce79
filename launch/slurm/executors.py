"""submitit's executors, handing over our own batch file and command instead of a pickled function.

So a job file can be read, kept and submitted again by hand, all ranks save (not only rank 0), a job that stopped is
requeued after its ranks have ended (none is left over on a node), and nothing is ever unpickled.
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

from .sbatch import BatchJob, supervise_words, task_command, with_index


class BatchFileExecutor(submitit.SlurmExecutor):
    """Submits a given batch file; the returned submitit job knows its state, log and how to cancel it."""

    def __init__(self, folder: Path, text: str) -> None:
        super().__init__(folder)
        self.text = text

    @classmethod
    def affinity(cls) -> int:
        return 2

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.text


def submit_to_slurm(job: BatchJob, text: str) -> str:
    """The job's id. Raises `UserError` without SLURM, `RunFailed` with SLURM's reason when it refuses."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "no sbatch here: submit from a login node of the cluster, or use --cluster local"
        )
    folder = job.folder / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.redirect_stderr(
            io.StringIO()
        ):  # submitit repeats there what the error says
            return str(BatchFileExecutor(folder, text)._submit_command("").job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line for line in str(error).splitlines() if line.startswith("sbatch: ")]
        said = "; ".join(lines or [" ".join(str(error).split())])[:400].replace(
            "sbatch: error: ", ""
        )
        raise RunFailed(f"SLURM refused the job: {said}") from None


def start_here(job: BatchJob, minutes: int, index: int | None = None) -> LocalJob:
    """Start on this machine in the background, with the same supervision: a time limit, restarts, the same log."""
    wanted, here = job.resources.gpus_per_node, torch.cuda.device_count()
    if wanted > here:
        raise UserError(f"--cluster local: --gpus-per-node {wanted}, but this machine has {here}")
    words = local_words(job, index)
    executor = LocalExecutor(job.folder / "jobs")
    executor.update_parameters(
        timeout_min=minutes,
        signal_delay_s=min(job.resources.signal_s, 30 * minutes),
        gpus_per_node=job.resources.gpus_per_node,
        stderr_to_stdout=True,
    )
    started: LocalJob = executor._submit_command(shlex.join(words))
    return started


def local_words(job: BatchJob, index: int | None = None) -> list[str]:
    """The supervised command line of a job, or of one task of an array, on this machine."""
    if job.resources.nodes > 1:
        raise UserError("--cluster local: this machine is one node; leave --nodes out")
    words = [*supervise_words(job), *task_command(job)]
    if index is not None:
        words = with_index(words, index)
    environment = [f"LIVERSEG_JOB_NAME={job.name}", *job.environment]
    if job.code is not None:
        environment += [f"PYTHONPATH={job.code}", "PYTHONSAFEPATH=1"]
    words = ["env", "-C", str(job.workdir), *environment, *words]
    if job.setup is None:
        return words
    return ["bash", "-c", 'source "$0" && exec "$@"', str(job.setup), *words]


def run_in_this_process(
    folder: Path, function: Callable[[list[str]], int], arguments: list[str]
) -> int:
    """`--cluster debug`: one process, this one, so that breakpoint() works."""
    os.environ.pop("SLURM_STEP_NUM_TASKS", None)
    return int(DebugExecutor(folder).submit(function, arguments).result())
