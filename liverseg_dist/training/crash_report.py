"""Crash reports: all details of a failure in a file of the run; the terminal shows one line."""

import json
import os
import platform
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from liverseg_dist.errors import LiversegError, os_error_line
from liverseg_dist.training.run_folder import version_environment

REPORTED_VARIABLES = (
    "CUDA_", "GLOO_", "LIVERSEG_", "LOCAL_", "MALLOC_", "MASTER_", "NCCL_", "OMP_", "PYTORCH_",
    "RANK", "SLURM_JOB_", "SLURM_STEP_", "TORCH", "WORLD_SIZE",
)  # fmt: skip
"""Prefixes of the environment variables that a report contains. Other variables may be secrets."""
MAX_REASON_CHARACTERS = 240


def write_crash_report(
    folder: Path, error: BaseException, rank: int, step: int, samples: Sequence[str] = ()
) -> Path | None:
    """Write `folder`/errors/TIME_rankN.txt.

    The report has time, host, rank, command line, versions, environment variables and traceback.

    Args:
        folder: folder of the run.
        error: exception that ended the work.
        rank: global rank of this process.
        step: optimizer step (from 0); -1 if the work has no steps.
        samples: samples of the last micro-batch, as "number in the run (case)".

    Returns:
        The file; None if it cannot be written.
    """
    path = folder / "errors" / f"{time.strftime('%Y-%m-%d_%H%M%S')}_rank{rank}.txt"
    variables = {}
    for name, value in sorted(os.environ.items()):
        if name.startswith(REPORTED_VARIABLES):
            variables[name] = value
    head = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "rank": rank,
        "step": step,
        "last_samples": list(samples),
        "command": sys.argv,
        "platform": platform.platform(),
        **version_environment(),
        "variables": variables,
    }
    # Do not initialise CUDA only for the report.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        head["gpu_memory"] = torch.cuda.memory_summary(abbreviated=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trace = "".join(traceback.format_exception(error))
        path.write_text(f"{json.dumps(head, indent=1)}\n\n{trace}", encoding="utf-8")
    except OSError:
        return None
    return path


def summarize_exception(error: BaseException) -> str:
    """Describe an exception in one line, with a remedy if one is known."""
    if isinstance(error, LiversegError):
        return str(error)
    reason = " ".join(str(error).split())[:MAX_REASON_CHARACTERS]
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"{reason} Make train.micro_batch_size or data.patch_size smaller, or set "
            "train.activation_checkpointing=all"
        )
    if isinstance(error, MemoryError):
        return (
            f"the host has no free memory ({reason}); use fewer data.workers or a smaller "
            "data.prefetch"
        )
    if isinstance(error, OSError) and error.strerror:
        return os_error_line(error)
    return f"{type(error).__name__}: {reason}"
