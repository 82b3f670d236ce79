"""Tell what this machine has, and what would go wrong later: packages, GPUs, shared memory, SLURM, disk.

liverseg doctor
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED

PACKAGES = ("torch", "deepspeed", "ray", "zarr", "numcodecs", "nibabel", "submitit", "tensorboard", "numpy")
SMALL_SHM_GIB = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path(), help="where runs would be written (default: here)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "slurm": shutil.which("sbatch") is not None,
        **{name: _version(name) for name in PACKAGES},
    }
    problems = [f"{name} is not installed; run tools/setup" for name in PACKAGES if facts[name] is None]
    warnings = []
    if str(facts["torch"]).startswith("2.9."):
        problems.append("torch 2.9 computes 3D convolutions under AMP about 4 times slower; take another version")
    if shutil.which("nvidia-smi") and not facts["gpus"]:
        warnings.append("there is an NVIDIA driver, but torch sees no GPU: LIVERSEG_TORCH=cuda tools/setup")
    if os.path.isdir("/dev/shm") and (free := shutil.disk_usage("/dev/shm").free / 2**30) < SMALL_SHM_GIB:
        warnings.append(f"/dev/shm has {free:.1f} GiB free: the cases' cache of a node (data.cache_gib) will not fit")
    if not os.access(args.folder, os.W_OK):
        problems.append(f"{args.folder.resolve()}: runs cannot be written here; choose another run.dir")
    for name, value in facts.items():
        print(f"{name:12} {', '.join(value) or 'none' if isinstance(value, list) else value}")
    for text in problems:
        print(f"problem: {text}")
    for text in warnings:
        print(f"warning: {text}")
    if not problems and not warnings:
        print("nothing stands in the way")
    return {**facts, "problems": problems, "warnings": warnings, "exit_code": EXIT_FAILED if problems else EXIT_DONE}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
