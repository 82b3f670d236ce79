"""The whole story of a failure, in a file of the run; the user's terminal gets one line."""

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
    "CUDA_", "GLOO_", "LIVERSEG_", "LOCAL_", "MALLOC_", "MASTER_", "NCCL_", "OMP_", "PYTORCH_", "RANK", "SLURM_JOB_",
    "SLURM_STEP_", "TORCH", "WORLD_SIZE",
)  # fmt: skip
"""Beginnings of the environment variables that a story tells; others may hold secrets."""


def write_crash_report(
    folder: Path, error: BaseException, rank: int, step: int, samples: Sequence[str] = ()
) -> Path | None:
    """RUN/errors/TIME_rankN.txt: where, when, what was called, the last samples, versions, environment, traceback.

    `samples`: of the last micro-batch, number in the run and case. None if it cannot be written.
    """
    path = folder / "errors" / f"{time.strftime('%Y-%m-%d_%H%M%S')}_rank{rank}.txt"
    head = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "rank": rank,
        "step": step,
        "last_samples": list(samples),
        "command": sys.argv,
        "platform": platform.platform(),
        **version_environment(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(REPORTED_VARIABLES)
        },
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        head["gpu_memory"] = torch.cuda.memory_summary(abbreviated=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        story = "".join(traceback.format_exception(error))
        path.write_text(f"{json.dumps(head, indent=1)}\n\n{story}", encoding="utf-8")
    except OSError:
        return None
    return path


def summarize_exception(error: BaseException) -> str:
    """What happened and, where it is known, what to do about it."""
    if isinstance(error, LiversegError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"{_first_sentence(error)} Make train.micro_batch_size or data.patch_size smaller, or set "
            "train.activation_checkpointing=all"
        )
    if isinstance(error, MemoryError):
        return f"the host's memory is full ({_first_sentence(error)}); fewer data.workers or data.prefetch need less"
    if isinstance(error, OSError) and error.strerror:
        return os_error_line(error)
    return f"{type(error).__name__}: {_first_sentence(error)}"


def _first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split())[:240]
