"""The whole story of a failure, in a file of the run; the user's terminal gets one line."""

import json
import platform
import socket
import sys
import time
import traceback
from pathlib import Path

import torch

from liverseg_dist.errors import LiversegError
from liverseg_dist.training.run_folder import environment


def write_story(folder: Path, error: BaseException, rank: int, step: int) -> Path | None:
    """RUN/errors/TIME_rankN.txt: where, when, what was called, versions, traceback. None if it cannot be written."""
    path = folder / "errors" / f"{time.strftime('%Y-%m-%d_%H%M%S')}_rank{rank}.txt"
    head = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "rank": rank,
        "step": step,
        "command": sys.argv,
        "platform": platform.platform(),
        **environment(),
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


def in_one_line(error: BaseException) -> str:
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
        return f"{error.filename or ''}: {error.strerror}".removeprefix(": ")
    return f"{type(error).__name__}: {_first_sentence(error)}"


def _first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split())[:240]
