"""Real torchrun processes for tests: one fresh port per job, a hard time limit, the whole output in the failure."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", "TORCH_CPP_LOG_LEVEL": "ERROR"}
LEFT_BY_OTHERS = ("SLURM_", "TORCHELASTIC", "RANK", "WORLD_SIZE", "RAY_AUTH", "LIVERSEG_PRIVATE")


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without anything a launcher may have left in it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LEFT_BY_OTHERS)}
    return {**kept, **ENVIRONMENT, **extra}


def torchrun_command(ranks: int, *arguments: str) -> list[str]:
    meeting = ("--rdzv-backend=liverseg", "--rdzv-endpoint=localhost:0")
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *meeting,
        f"--nproc-per-node={ranks}",
        *arguments,
    ]


def torchrun(
    ranks: int, *arguments: str, timeout_s: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end; `arguments`: a script or `-m module`, and its own arguments. Nothing outlives the time limit."""
    return _run(torchrun_command(ranks, *arguments), timeout_s, environment)


def liverseg(
    *arguments: str, timeout_s: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    return _run(
        [sys.executable, "-m", "liverseg_dist", *map(str, arguments)], timeout_s, environment
    )


def _run(
    command: list[str], timeout_s: float, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    process = subprocess.Popen(
        command,
        env=clean_environment(**environment),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(
            f"no end after {timeout_s} s: {command}\n{out[-3000:]}\n{err[-3000:]}"
        ) from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)
