"""Tell what this machine has, what each of it is for, and what would go wrong later.

liverseg doctor --folder runs      torch build, GPUs, NCCL, DeepSpeed ops, Ray, SLURM, write speed, /dev/shm, limits

Several nodes, and the network between them: python -m launch doctor --nodes 2.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from liverseg_dist.cores import usable_cores
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED
from liverseg_dist.locks import hold_lock
from liverseg_dist.texts.paths import path_argument
from liverseg_dist.tracking.terminal_table import print_table

PACKAGES = (
    "torch",
    "deepspeed",
    "ray",
    "zarr",
    "numcodecs",
    "nibabel",
    "submitit",
    "tensorboard",
    "numpy",
)
SHARED_MEMORY = Path("/dev/shm")  # looked at, not written to  # nosec B108
SMALL_SHM_GIB = 1.0
SMALL_DISK_GIB = 5.0
FEW_FILES = 1024
PROBE_BYTES = 64 << 20
PROBE_FILES = 50
SLOW_MIB_S = 50.0
SLOW_FILE_MS = 50.0
LOCKS_REMEDY = (
    "have it mounted with them (Lustre: -o flock), or never run two sweeps in one run.dir"
)


@dataclass
class Findings:
    """`facts` for scripts; `lines`: (name, value, what it is for); what stands in the way; what is only slow or odd."""

    facts: dict[str, Any] = field(default_factory=dict)
    lines: list[tuple[str, str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def tell(self, name: str, value: Any, meaning: str, shown: str = "") -> None:
        self.facts[name] = value
        self.lines.append(
            (name, shown or ("none" if value in (None, [], "") else str(value)), meaning)
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder",
        type=path_argument,
        default=Path(),
        help="where runs would be written (default: here)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    found = Findings()
    _machine(found)
    _packages(found)
    _torch(found)
    _deepspeed(found)
    _ray_and_slurm(found)
    _shared_memory(found)
    _disk(found, args.folder)
    print_table(("name", "value", "purpose"), found.lines, plain=True)
    for text in found.problems:
        print(f"problem: {text}")
    for text in found.warnings:
        print(f"warning: {text}")
    if not found.problems and not found.warnings:
        print("nothing stands in the way")
    told = {"problems": found.problems, "warnings": found.warnings}
    return {**found.facts, **told, "exit_code": EXIT_FAILED if found.problems else EXIT_DONE}


def _machine(found: Findings) -> None:
    found.tell("python", platform.python_version(), "")
    found.tell(
        "cores", usable_cores(), "this process may use; shared out among the ranks of a node"
    )
    memory_gib = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    found.tell(
        "memory_gib", memory_gib, "conversion takes 1 GiB a worker for a scan of 512 x 512 x 700"
    )
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    found.tell("open_files", files, "at a time; a rank keeps up to 128 of the store's open")
    if files < FEW_FILES:
        found.warnings.append(f"only {files} files may be open at a time: ulimit -n 4096")


def _packages(found: Findings) -> None:
    for name in PACKAGES:
        try:
            version: str | None = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
            found.problems.append(f"{name} is not installed; run tools/setup")
        found.tell(name, version, "")


def _torch(found: Findings) -> None:
    found.tell(
        "cuda", torch.version.cuda, "torch's build; none: a build for CPUs alone, or for AMD"
    )
    count = torch.cuda.device_count()
    gpus = [torch.cuda.get_device_properties(i) for i in range(count)]
    shown = ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)
    found.tell(
        "gpus",
        [gpu.name for gpu in gpus],
        "that torch can use; liverseg plan tells what fits",
        shown,
    )
    if shutil.which("nvidia-smi") and not gpus:
        found.warnings.append(
            "there is an NVIDIA driver, but torch sees no GPU: LIVERSEG_TORCH=cuda tools/setup"
        )
    built = set(torch.cuda.get_arch_list())
    for gpu in gpus:
        if built and f"sm_{gpu.major}{gpu.minor}" not in built and f"sm_{gpu.major}0" not in built:
            found.problems.append(
                f"torch was not built for {gpu.name} (sm_{gpu.major}{gpu.minor}); take another build"
            )
    nccl = (
        ".".join(map(str, torch.cuda.nccl.version()))
        if gpus and torch.distributed.is_nccl_available()
        else None
    )
    found.tell("nccl", nccl, "carries sums between GPUs; without GPUs gloo does")
    if len(gpus) > 1 and nccl is None:
        found.problems.append(
            "several GPUs, but this torch has no NCCL: they cannot train together; take a CUDA build"
        )
    found.tell(
        "gloo",
        torch.distributed.is_gloo_available(),
        "carries sums between CPUs, and small messages always",
    )
    try:
        address: str | None = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = None
        found.warnings.append(
            f"{socket.gethostname()} has no address: other nodes cannot reach it; mend /etc/hosts"
        )
    found.tell("address", address, "of this host's name; a loopback one serves one node only")
    ours = "liverseg" in importlib.metadata.entry_points(group="torchrun.handlers").names
    found.tell(
        "rendezvous",
        ours,
        "torchrun --rdzv-backend=liverseg: open to the job alone",
        "yes" if ours else "no",
    )
    if not ours:
        found.problems.append(
            "torchrun does not find --rdzv-backend=liverseg: run tools/setup again, or pip install -e ."
        )


def _deepspeed(found: Findings) -> None:
    """Which ops are built in or could be built here; without any ZeRO still runs, with torch's optimizer."""
    wanted = ("fused_adam", "cpu_adam")
    nvcc, compiler = shutil.which("nvcc"), shutil.which("g++") or shutil.which("c++")
    package = importlib.util.find_spec("deepspeed")  # looked for, not imported: that takes seconds
    home = Path(package.origin).parent if package is not None and package.origin else None
    state = {}
    for name in wanted if home is not None else ():
        can_be_built = compiler and (nvcc or name == "cpu_adam")
        built = next(home.rglob(f"{name}*.so"), None) if home is not None else None
        state[name] = (
            "built in" if built else "built when first used" if can_be_built else "needs a compiler"
        )
    shown = ", ".join(f"{name} {text}" for name, text in state.items())
    found.tell("deepspeed_ops", state, "not needed: our ZeRO runs with torch's optimizers", shown)


def _ray_and_slurm(found: Findings) -> None:
    dashboard = (
        importlib.util.find_spec("aiohttp_cors") is not None and found.facts["ray"] is not None
    )
    found.tell(
        "ray_dashboard",
        dashboard,
        "of launch.tune, on loopback, with a token",
        "yes" if dashboard else "no",
    )
    if found.facts["ray"] is not None and not dashboard:
        found.warnings.append("Ray has no dashboard: pip install 'ray[default]'")
    there = shutil.which("sbatch") is not None
    found.tell("slurm", there, "python -m launch submits to it", "yes" if there else "no")
    if there:
        answer = _said("sinfo", "--noheader", "--format=%P %D %a")
        found.tell(
            "partitions", answer.splitlines(), "name, nodes, state", "; ".join(answer.splitlines())
        )
        if not answer:
            found.warnings.append(
                "SLURM is installed, but sinfo says nothing: no controller answers from here"
            )
        elif not _said("sacct", "--version"):
            found.warnings.append(
                "sacct is missing: python -m launch status learns of ended jobs from it"
            )


def _shared_memory(found: Findings) -> None:
    if not SHARED_MEMORY.is_dir():
        found.tell("shm_gib", None, f"{SHARED_MEMORY}: the cases' cache of a node, data.cache_gib")
        return
    free_gib = shutil.disk_usage(SHARED_MEMORY).free / 2**30
    found.tell(
        "shm_gib",
        round(free_gib, 1),
        f"free in {SHARED_MEMORY}: the cases' cache of a node, data.cache_gib",
    )
    if free_gib < SMALL_SHM_GIB:
        found.warnings.append(
            f"{SHARED_MEMORY} has {free_gib:.1f} GiB free: the cases' cache of a node (data.cache_gib) will not fit; "
            "in Docker: --shm-size"
        )


def _disk(found: Findings, folder: Path) -> None:
    """Runs and stores are written as large files and as many small ones; each is tried."""
    where = folder.resolve()
    try:
        free_gib = shutil.disk_usage(folder).free / 2**30
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as name:
            mib_s, file_ms = _write_speed(Path(name))
            with hold_lock(Path(name) / "lock") as has_locks:
                pass
    except OSError as error:
        reason = error.strerror or error
        found.problems.append(
            f"{where}: runs cannot be written here ({reason}); choose another run.dir"
        )
        return
    found.tell("free_gib", round(free_gib, 1), f"in {where}")
    found.tell("write_mib_s", round(mib_s), "there, one stream, synced: what checkpoints wait for")
    found.tell(
        "small_file_ms",
        round(file_ms, 2),
        "there, to make and sync one; a case of a store is 9 files",
    )
    found.tell(
        "locks",
        has_locks,
        "there: they keep two sweeps, or conversions, apart",
        "yes" if has_locks else "no",
    )
    if not has_locks:
        found.warnings.append(f"{where} has no file locks: {LOCKS_REMEDY}")
    if free_gib < SMALL_DISK_GIB:
        found.warnings.append(f"{where}: {free_gib:.1f} GiB free is little for a store or a run")
    if mib_s < SLOW_MIB_S:
        found.warnings.append(
            f"{where}: written at {mib_s:.0f} MiB/s; checkpoints wait, take a faster run.dir"
        )
    if file_ms > SLOW_FILE_MS:
        found.warnings.append(
            f"{where}: a small file takes {file_ms:.0f} ms; converting there will be slow"
        )


def _write_speed(folder: Path) -> tuple[float, float]:
    """(MiB/s of one large file, ms for each of many small ones), both on the disk when this returns."""
    block = os.urandom(1 << 20)
    begun = time.monotonic()
    with (folder / "large").open("wb") as file:
        for _ in range(PROBE_BYTES >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    large_s = time.monotonic() - begun
    begun = time.monotonic()
    for number in range(PROBE_FILES):
        with (folder / f"small_{number}").open("wb") as file:
            file.write(block[:1024])
            file.flush()
            os.fsync(file.fileno())
    return PROBE_BYTES / 2**20 / max(large_s, 1e-6), 1000 * (time.monotonic() - begun) / PROBE_FILES


def _said(*words: str) -> str:
    """A program's answer, or '' when it has none within some seconds."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
