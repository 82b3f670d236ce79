"""The process of each rank of `launch doctor`: tests its node and the connection to the others.

  srun ... python -m launch.diagnose.probe --folder DIR --marker NAME --gpus N

It prints lines `liverseg probe {...}`: first the results of the node alone, then those that need
all ranks. The log is the one channel that needs neither the network nor a shared folder, so it also
reports nodes that lack them.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import secrets
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from liverseg_dist.distributed import collectives
from liverseg_dist.distributed.placement import (
    SYS,
    find_gpu_address,
    read_pci_numa_node,
    read_topology,
)
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import EXIT_DONE, UserError
from liverseg_dist.locks import hold_lock
from liverseg_dist.streams import guard_output_streams
from liverseg_dist.texts.paths import path_argument

from .. import PACKAGE, name_programs
from ..slurm.code_snapshot import compute_code_digest

LINE_PREFIX = "liverseg probe "
MARKER_PREFIX = ".doctor-"
WRITE_TEST_MIB = 64
CONNECT_TIMEOUT_S = 60.0
"""A rank that has not connected by then will not connect."""
ROUNDS = 5
COMPARED_PACKAGES = ("torch", "numpy", "zarr")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests of this rank; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {PACKAGE}.diagnose.probe", description=name_programs(__doc__ or "")
    )
    parser.add_argument("--folder", type=path_argument, required=True)
    parser.add_argument(
        "--marker",
        required=True,
        help=f"FOLDER has the file {MARKER_PREFIX}MARKER of the submitter",
    )
    parser.add_argument("--gpus", type=int, required=True, help="requested GPUs per node")
    args = parser.parse_args(argv)
    # A rank without its GPU reports that, and tests the network with Gloo.
    device = "cuda" if args.gpus and torch.cuda.is_available() else "cpu"
    node = platform.node()
    try:
        # As the commands start: each rank is bound to its share of the node's CPUs.
        world = World.from_environment(device).with_cpu_binding()
    except UserError as error:
        rank = int(os.environ.get("SLURM_PROCID", "0"))
        print_line({"rank": rank, "node": node, "error": str(error)})
        return EXIT_DONE
    place = {"rank": world.global_rank, "node": node}
    own_results = {"versions": probe_versions(), "gpus": probe_gpus(), **probe_placement(world)}
    # One rank per node measures the write speed; several would share it.
    folder_results = probe_folder(args.folder, args.marker, write=world.local_rank == 0)
    print_line({**place, **own_results, **folder_results})
    print_line({**place, **probe_network(world)})
    return EXIT_DONE


def print_line(content: dict[str, Any]) -> None:
    """Print a report in one write.

    Ranks may share a pipe, in which the parts of two lines would be mixed.
    """
    with suppress(OSError):  # the other ranks need this one also when nothing reads its output
        os.write(sys.stdout.fileno(), f"{LINE_PREFIX}{json.dumps(content)}\n".encode())


def probe_versions() -> dict[str, str]:
    """The versions that must be equal on all nodes."""
    found = {"python": platform.python_version(), "code": compute_code_digest()}
    for name in COMPARED_PACKAGES:
        found[name] = importlib.metadata.version(name)
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def probe_gpus() -> list[list[float]]:
    """[free GiB, total GiB] of each GPU that this rank sees."""
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append([round(free / 2**30, 1), round(total / 2**30, 1)])
    return found


def probe_placement(world: World, root: Path = SYS) -> dict[str, Any]:
    """How many CPUs this rank may use, and the NUMA nodes of its CPUs and of its GPU.

    Args:
        world: this rank, after it was bound to CPUs.
        root: where sysfs is mounted.
    """
    cpus = frozenset(os.sched_getaffinity(0))
    topology = read_topology(root)
    found: dict[str, Any] = {
        "cpus": len(cpus),
        "cpu_nodes": topology.nodes_of(cpus),
        "numa_nodes": len(topology.numa_nodes),
    }
    if world.device.type == "cuda":
        address = find_gpu_address(world.device.index or 0)
        found["gpu_node"] = None if address is None else read_pci_numa_node(address, root)
    return found


def probe_folder(path: Path, marker: str, *, write: bool) -> dict[str, Any]:
    """Test the folder of the submitter.

    Args:
        path: The folder.
        marker: Name of the file that the submitter wrote there.
        write: Whether to measure the write speed (with fsync) and to test file locks.

    Returns:
        `sees_folder`; with `write` also `write_mib_s` and `locks`, or `write_error`.
    """
    if not (path / f"{MARKER_PREFIX}{marker}").is_file():
        return {"sees_folder": False}
    if not write:
        return {"sees_folder": True}
    test_file = path / f"{MARKER_PREFIX}{marker}-{platform.node()}"
    # Random bytes, because the file system may compress.
    block = secrets.token_bytes(2**20)
    begun = time.perf_counter()
    try:
        with test_file.open("wb") as file:
            for _ in range(WRITE_TEST_MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        speed = WRITE_TEST_MIB / (time.perf_counter() - begun)
        with hold_lock(test_file) as has_locks:
            pass
    except OSError as error:
        return {"sees_folder": True, "write_error": str(error.strerror)}
    finally:
        test_file.unlink(missing_ok=True)
    return {"sees_folder": True, "write_mib_s": round(speed, 1), "locks": has_locks}


def probe_network(world: World) -> dict[str, Any]:
    """Connect the ranks and measure clocks and bandwidth.

    Returns:
        `meets` (whether the ranks could connect), `all_reduce_gib_s` and `clock_s` (offset from
        rank 0), or `network_error`.
    """
    try:
        with world.connected(timeout_s=CONNECT_TIMEOUT_S):
            return {
                "meets": True,
                "clock_s": _measure_clock_offset_s(),
                "all_reduce_gib_s": _measure_all_reduce_gib_s(world),
            }
    except (RuntimeError, OSError) as error:  # torch's DistError is a RuntimeError
        return {"meets": False, "network_error": str(error).splitlines()[0][:200]}


def _measure_clock_offset_s() -> float:
    """The smallest difference of several rounds; the rest is the time of the message."""
    rounds: list[float] = []
    for _ in range(ROUNDS):
        collectives.barrier()
        times: list[float] = collectives.gather_from_ranks(time.time())
        rounds.append(times[collectives.current_rank()] - times[0])
    return round(sorted(rounds, key=abs)[0], 4)


def _measure_all_reduce_gib_s(world: World) -> float | None:
    """Bus bandwidth, 2 (n - 1) / n bytes / s; None for one rank.

    Definition: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
    """
    if not world.is_distributed:
        return None
    is_cuda = world.device.type == "cuda"
    size_mib = 256 if is_cuda else 16
    data = torch.ones(size_mib * 2**20 // 4, device=world.device)  # float32: 4 bytes
    fastest_s = float("inf")
    for _ in range(ROUNDS):
        collectives.barrier()
        begun = time.perf_counter()
        dist.all_reduce(data, op=dist.ReduceOp.MAX)
        if is_cuda:
            torch.cuda.synchronize(world.device)
        fastest_s = min(fastest_s, time.perf_counter() - begun)
    moved = 2 * (world.world_size - 1) / world.world_size * data.numel() * 4
    return round(moved / fastest_s / 2**30, 3)


if __name__ == "__main__":
    guard_output_streams()
    sys.exit(main())
