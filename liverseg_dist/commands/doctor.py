"""Check this machine: what it has, what that is used for, and what would cause a failure later.

liverseg doctor --folder runs      torch build, GPUs, NCCL, DeepSpeed ops, Ray, SLURM, write speed, /dev/shm, limits

Several nodes and the network between them: python -m launch doctor --nodes 2.
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

from liverseg_dist.console import write_lines
from liverseg_dist.cores import usable_cores
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED
from liverseg_dist.locks import LOCKS_REMEDY, hold_lock
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
DEEPSPEED_OPS = ("fused_adam", "cpu_adam")
SHARED_MEMORY = Path("/dev/shm")  # only its size is read  # nosec B108
# Limits of what a small run needs. Below them commands fail or become slow in ways that their
# messages do not explain.
MIN_SHM_GIB = 1.0
MIN_DISK_GIB = 5.0
MIN_OPEN_FILES = 1024
# 64 MiB are more than the write buffers of most drives, and are written within a second on a slow
# one.
PROBE_BYTES = 64 << 20
PROBE_FILES = 50
# A checkpoint of 400 MB then takes 8 s, during which the next one must not be due.
MIN_WRITE_MIB_S = 50.0
MAX_SMALL_FILE_MS = 50.0
PROGRAM_TIMEOUT_S = 20


@dataclass
class Findings:
    """Facts about the machine, and the problems and warnings that follow from them."""

    facts: dict[str, Any] = field(default_factory=dict)
    """For scripts (`--json`)."""
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    """For the terminal: name, value, purpose."""
    problems: list[str] = field(default_factory=list)
    """What makes a command fail."""
    warnings: list[str] = field(default_factory=list)
    """What makes a command slow, or fail in some cases."""

    def add_fact(self, name: str, value: Any, purpose: str, shown: str = "") -> None:
        """Record a fact.

        Args:
            purpose: what the value is used for.
            shown: text for the terminal, if it differs from `value`.
        """
        self.facts[name] = value
        text = "none" if value in (None, [], "") else str(value)
        self.rows.append((name, shown or text, purpose))

    def add_flag(self, name: str, value: bool, purpose: str) -> None:
        """Record a fact that is shown as yes or no."""
        self.add_fact(name, value, purpose, "yes" if value else "no")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder",
        type=path_argument,
        default=Path(),
        help="folder for runs, whose speed is measured (default: the current folder)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check everything and print a table, problems and warnings."""
    found = Findings()
    _check_machine(found)
    _check_packages(found)
    _check_torch(found)
    _check_network(found)
    _check_deepspeed(found)
    _check_ray(found)
    _check_slurm(found)
    _check_shared_memory(found)
    _check_disk(found, args.folder)
    print_table(("name", "value", "purpose"), found.rows, plain=True)
    # On stdout: here problems and warnings are the result.
    lines = [f"problem: {text}" for text in found.problems]
    lines += [f"warning: {text}" for text in found.warnings]
    write_lines(*(lines or ["no problems found"]))
    return {
        **found.facts,
        "problems": found.problems,
        "warnings": found.warnings,
        "exit_code": EXIT_FAILED if found.problems else EXIT_DONE,
    }


def _check_machine(found: Findings) -> None:
    found.add_fact("python", platform.python_version(), "")
    found.add_fact(
        "cores", usable_cores(), "usable by this process; divided among the ranks of a node"
    )
    memory_gib = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    found.add_fact(
        "memory_gib", memory_gib, "conversion: 1 GiB per worker for a scan of 512 x 512 x 700"
    )
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    found.add_fact("open_files", files, "limit; a rank keeps up to 128 files of the store open")
    # A rank keeps files of the store open, and gloo opens sockets to each other rank.
    if files < MIN_OPEN_FILES:
        found.warnings.append(f"only {files} files may be open at a time: ulimit -n 4096")


def _check_packages(found: Findings) -> None:
    for name in PACKAGES:
        try:
            version: str | None = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
            found.problems.append(f"{name} is not installed; run tools/setup")
        found.add_fact(name, version, "")


def _check_torch(found: Findings) -> None:
    found.add_fact("cuda", torch.version.cuda, "CUDA of the torch build; none: for CPU or AMD")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    shown = ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)
    names = [gpu.name for gpu in gpus]
    found.add_fact("gpus", names, "usable by torch; liverseg plan: what fits on them", shown)
    # A CPU build of torch beside a driver is the most frequent reason for a training that does not
    # use the GPU.
    if shutil.which("nvidia-smi") and not gpus:
        found.warnings.append(
            "an NVIDIA driver is installed, but torch finds no GPU: LIVERSEG_TORCH=cuda tools/setup"
        )
    built = set(torch.cuda.get_arch_list())
    for gpu in gpus:
        # A build for sm_80 also runs on sm_86: the major version decides.
        is_supported = f"sm_{gpu.major}{gpu.minor}" in built or f"sm_{gpu.major}0" in built
        # CUDA code is compatible within a major version of the compute capability.
        if built and not is_supported:
            found.problems.append(
                f"torch was not built for {gpu.name} (sm_{gpu.major}{gpu.minor}); "
                "install another build"
            )
    nccl = None
    if gpus and torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    found.add_fact("nccl", nccl, "communication between GPUs; without GPUs gloo is used")
    if len(gpus) > 1 and nccl is None:
        found.problems.append(
            "several GPUs, but this torch has no NCCL, so they cannot train together; "
            "install a CUDA build"
        )
    gloo = torch.distributed.is_gloo_available()
    found.add_fact("gloo", gloo, "communication between CPUs, and small messages")


def _check_network(found: Findings) -> None:
    host = socket.gethostname()
    try:
        address: str | None = socket.gethostbyname(host)
    except OSError:
        address = None
        found.warnings.append(
            f"{host} has no address, so other nodes cannot connect to it; correct /etc/hosts"
        )
    found.add_fact("address", address, "of this host's name; loopback: for one node only")
    handlers = importlib.metadata.entry_points(group="torchrun.handlers").names
    is_registered = "liverseg" in handlers
    purpose = "torchrun --rdzv-backend=liverseg, for machines that others can reach"
    found.add_flag("rendezvous", is_registered, purpose)
    if not is_registered:
        found.problems.append(
            "torchrun does not find --rdzv-backend=liverseg: run tools/setup again, "
            "or pip install -e ."
        )


def _check_deepspeed(found: Findings) -> None:
    """Find the ops of DeepSpeed that are built or can be built. ZeRO also runs without them."""
    nvcc = shutil.which("nvcc")
    compiler = shutil.which("g++") or shutil.which("c++")
    # Located, not imported: the import takes seconds.
    package = importlib.util.find_spec("deepspeed")
    state = {}
    # Only the files are looked at: building an op to test it takes minutes.
    if package is not None and package.origin:
        for name in DEEPSPEED_OPS:
            can_be_built = compiler and (nvcc or name == "cpu_adam")
            if next(Path(package.origin).parent.rglob(f"{name}*.so"), None):
                state[name] = "built in"
            else:
                state[name] = "built when first used" if can_be_built else "needs a compiler"
    shown = ", ".join(f"{name} {text}" for name, text in state.items())
    purpose = "optional: ZeRO runs here with torch's optimizers"
    found.add_fact("deepspeed_ops", state, purpose, shown)


def _check_ray(found: Findings) -> None:
    is_installed = found.facts["ray"] is not None
    has_dashboard = is_installed and importlib.util.find_spec("aiohttp_cors") is not None
    found.add_flag("ray_dashboard", has_dashboard, "of launch.tune, on loopback, with a token")
    if is_installed and not has_dashboard:
        found.warnings.append("Ray has no dashboard: pip install 'ray[default]'")


def _check_slurm(found: Findings) -> None:
    has_slurm = shutil.which("sbatch") is not None
    found.add_flag("slurm", has_slurm, "python -m launch submits to it")
    if not has_slurm:
        return
    partitions = _output_of("sinfo", "--noheader", "--format=%P %D %a").splitlines()
    found.add_fact("partitions", partitions, "name, nodes, state", "; ".join(partitions))
    if not partitions:
        found.warnings.append(
            "SLURM is installed, but sinfo fails: no controller answers from this machine"
        )
    elif not _output_of("sacct", "--version"):
        found.warnings.append("sacct is missing: python -m launch status needs it for ended jobs")


def _check_shared_memory(found: Findings) -> None:
    purpose = f"free in {SHARED_MEMORY}: cache of cases of a node, data.cache_gib"
    if not SHARED_MEMORY.is_dir():
        found.add_fact("shm_gib", None, purpose)
        return
    free_gib = shutil.disk_usage(SHARED_MEMORY).free / 2**30
    found.add_fact("shm_gib", round(free_gib, 1), purpose)
    if free_gib < MIN_SHM_GIB:
        found.warnings.append(
            f"{SHARED_MEMORY} has {free_gib:.1f} GiB free: the cache of cases of a node "
            "(data.cache_gib) will not fit; in Docker: --shm-size"
        )


def _check_disk(found: Findings, folder: Path) -> None:
    """Measure how fast the folder takes large and small files; runs and stores consist of both."""
    path = folder.resolve()
    try:
        free_gib = shutil.disk_usage(folder).free / 2**30
        # The disk is measured in the folder that runs will use: on a cluster each mount has
        # another speed.
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as name:
            mib_s, file_ms = _measure_write_speed(Path(name))
            with hold_lock(Path(name) / "lock") as has_locks:
                pass
    except OSError as error:
        reason = error.strerror or error
        found.problems.append(
            f"{path}: runs cannot be written here ({reason}); choose another run.dir"
        )
        return
    found.add_fact("free_gib", round(free_gib, 1), f"in {path}")
    found.add_fact("write_mib_s", round(mib_s), "one synced stream: the time of checkpoints")
    found.add_fact(
        "small_file_ms", round(file_ms, 2), "to create and sync a file; a case of a store has 9"
    )
    found.add_flag("locks", has_locks, "keep two sweeps or conversions from using one folder")
    if not has_locks:
        # Locks are missing on some network file systems, such as Lustre mounted without flock.
        found.warnings.append(f"{path} has no file locks: {LOCKS_REMEDY}")
    if free_gib < MIN_DISK_GIB:
        found.warnings.append(f"{path}: {free_gib:.1f} GiB free is little for a store or a run")
    if mib_s < MIN_WRITE_MIB_S:
        found.warnings.append(
            f"{path}: write speed is {mib_s:.0f} MiB/s, so checkpoints take long; "
            "choose a faster run.dir"
        )
    if file_ms > MAX_SMALL_FILE_MS:
        found.warnings.append(
            f"{path}: a small file takes {file_ms:.0f} ms, so conversion will be slow"
        )


def _measure_write_speed(folder: Path) -> tuple[float, float]:
    """Return (MiB/s of one large file, ms per small file), both synced to the disk."""
    # Random bytes: a file system that compresses would be too fast with zeros.
    block = os.urandom(1 << 20)
    start_s = time.monotonic()
    with (folder / "large").open("wb") as file:
        for _ in range(PROBE_BYTES >> 20):
            file.write(block)
        file.flush()
        # Without fsync the figures would be those of the page cache.
        os.fsync(file.fileno())
    large_s = time.monotonic() - start_s
    start_s = time.monotonic()
    for number in range(PROBE_FILES):
        with (folder / f"small_{number}").open("wb") as file:
            file.write(block[:1024])
            file.flush()
            os.fsync(file.fileno())
    small_s = time.monotonic() - start_s
    return PROBE_BYTES / 2**20 / max(large_s, 1e-6), 1000 * small_s / PROBE_FILES


def _output_of(*command: str) -> str:
    """Standard output of a program; empty if it fails or does not answer within some seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_TIMEOUT_S)
    # A program that hangs, such as sinfo without a controller, must not stop the diagnosis.
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
