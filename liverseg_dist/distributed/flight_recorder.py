"""Records of a blocked rank: its last collective calls, and the stacks of its threads.

PyTorch keeps the collective calls in a ring buffer if `TORCH_FR_BUFFER_SIZE` is set when the process groups are
created. After a failure each rank writes its buffer to the `errors/` folder of the run, next to
its crash report. `torchfrtrace` (part of PyTorch) compares the files that NCCL's watchdog writes.
"""

import faulthandler
import os
import time
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

import torch

BUFFER_SIZE = 2000
"""Collective calls that each rank remembers; some hundred bytes each."""
DUMP_FUNCTIONS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
"""Functions of `torch._C._distributed_c10d`: the recorder of NCCL, and that of all backends."""


def enable_flight_recorder(
    errors: Path, environment: MutableMapping[str, str] | None = None
) -> None:
    """Switch the recorder on. Call it before the process group is created.

    Variables that the user has set are not changed.

    Args:
        errors: folder for the dumps of NCCL's watchdog.
        environment: variables to change; the process's own if None.
    """
    env = os.environ if environment is None else environment
    env.setdefault("TORCH_FR_BUFFER_SIZE", str(BUFFER_SIZE))
    env.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    # The rank is appended to the name.
    env.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(errors.absolute() / "nccl_trace_rank"))


def write_flight_record(errors: Path, rank: int) -> Path | None:
    """Write `errors`/TIME_rankN_collectives.json with the last collective calls of this rank.

    Returns:
        The file; None if there is nothing to write or the file cannot be written.
    """
    functions = torch._C._distributed_c10d
    for name in DUMP_FUNCTIONS:
        dump = getattr(functions, name, None)
        if dump is None:
            continue
        try:
            content = dump()
        except RuntimeError:
            continue
        data = content if isinstance(content, bytes) else str(content).encode()
        if b'"entries":[{' not in data.replace(b" ", b""):
            continue
        path = errors / f"{time.strftime('%Y-%m-%d_%H%M%S')}_rank{rank}_collectives.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError:
            return None
        return path
    return None


def write_stacks(errors: Path, rank: int) -> None:
    """Write `errors`/TIME_rankN_stacks.txt with the stacks of all threads of this process.

    They show where a rank waits that cannot report an error itself.
    """
    path = errors / f"{time.strftime('%Y-%m-%d_%H%M%S')}_rank{rank}_stacks.txt"
    with suppress(OSError):
        errors.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            faulthandler.dump_traceback(descriptor)
        finally:
            os.close(descriptor)
