"""Which code ran, and on what: kept beside results, never inside what must be equal on every machine."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("liverseg_dist", "torch", "numpy", "zarr")


def collect_provenance(device: torch.device) -> dict[str, str]:
    """Commit, versions and hardware, in words; the same for every rank of a machine."""
    return {
        "commit": git_commit(),
        "device": device_name(device),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "cuda": torch.version.cuda or "none",
    }


def git_commit() -> str:
    """The commit of the code, with `+` where tracked files differ from it; `unknown` of an installed package."""
    kept = ROOT / "COMMIT"  # a submitted job runs from a copy that carries it
    if kept.is_file():
        return kept.read_text(encoding="utf-8").strip()
    if not (ROOT / ".git").exists():
        return "unknown"
    try:
        head = _git("rev-parse", "HEAD")
        return head + (
            "+"
            if _git("status", "--porcelain", "--untracked-files=no", "--", "liverseg_dist")
            else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "CPU"
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU"
    )


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.strip()
