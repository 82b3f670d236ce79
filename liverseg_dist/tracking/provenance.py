"""Versions of the code and the hardware of a run.

They are stored in files of their own (`environment.json`): all other results are equal on every
machine.
"""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("liverseg_dist", "torch", "numpy", "zarr")


def collect_provenance(device: torch.device) -> dict[str, str]:
    """Commit, versions and hardware by name; the same for every rank of a machine."""
    return {
        "commit": git_commit(),
        "device": device_name(device),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "cuda": torch.version.cuda or "none",
    }


def git_commit() -> str:
    """The commit of the code, with `+` where files differ; `unknown` outside a repository."""
    # A submitted job runs from a copy of the code with this file instead of a repository.
    commit_file = ROOT / "COMMIT"
    if commit_file.is_file():
        return commit_file.read_text(encoding="utf-8").strip()
    if not (ROOT / ".git").exists():
        return "unknown"
    try:
        head = _run_git("rev-parse", "HEAD")
        changes = _run_git("status", "--porcelain", "--untracked-files=no", "--", "liverseg_dist")
        return f"{head}+" if changes else head
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def device_name(device: torch.device) -> str:
    """Model name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "CPU"
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "CPU"


def _run_git(*arguments: str) -> str:
    process = subprocess.run(
        ["git", "-C", str(ROOT), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return process.stdout.strip()
