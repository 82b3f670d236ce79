"""What each rank of `launch doctor` runs: looks at its node, meets the others, and says what it found.

  srun ... python -m launch.diagnose.probe --folder DIR --word WORD --gpus N

It prints lines `liverseg probe {...}`: first what the node shows by itself, then what only ranks together can measure.
The log is the one channel that needs neither network nor a shared folder to tell of a node that lacks them.
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
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import EXIT_DONE, UserError
from liverseg_dist.locks import hold_lock
from liverseg_dist.streams import guard_output_streams
from liverseg_dist.texts.paths import path_argument

from .. import PACKAGE, name_programs
from ..slurm.code_snapshot import code_digest

MARK = "liverseg probe "
WRITTEN_MIB = 64
MEET_S = 60.0
"""A peer that has not come by then does not come."""
ROUNDS = 5


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {PACKAGE}.diagnose.probe", description=name_programs(__doc__ or "")
    )
    parser.add_argument("--folder", type=path_argument, required=True)
    parser.add_argument(
        "--word", required=True, help="what the submitter wrote into FOLDER/.doctor-WORD"
    )
    parser.add_argument("--gpus", type=int, required=True, help="GPUs per node that were asked for")
    args = parser.parse_args(argv)
    device = "cuda" if args.gpus and torch.cuda.is_available() else "cpu"
    try:
        world = World.from_environment(device)
    except UserError as error:
        rank = int(os.environ.get("SLURM_PROCID", "0"))
        print_line({"rank": rank, "node": platform.node(), "error": str(error)})
        return EXIT_DONE
    who = {"rank": world.global_rank, "node": platform.node()}
    print_line(
        who
        | {"versions": probe_versions(), "gpus": probe_gpus()}
        | probe_folder(args.folder, args.word, write=world.local_rank == 0)
    )
    print_line(who | probe_network(world))
    return EXIT_DONE


def print_line(content: dict[str, Any]) -> None:
    """In one write: ranks may share a pipe, where the parts of two lines would mingle."""
    with suppress(OSError):  # without a reader the other ranks still need this one
        os.write(sys.stdout.fileno(), f"{MARK}{json.dumps(content)}\n".encode())


def probe_versions() -> dict[str, str]:
    """All that has to be the same on every node."""
    found = {"python": platform.python_version(), "code": code_digest()}
    found |= {name: importlib.metadata.version(name) for name in ("torch", "numpy", "zarr")}
    if torch.cuda.is_available():
        found |= {
            "cuda": str(torch.version.cuda),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def probe_gpus() -> list[list[float]]:
    """(free GiB, total GiB) of each GPU that this rank sees."""
    found = (torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count()))
    return [[round(free / 2**30, 1), round(total / 2**30, 1)] for free, total in found]


def probe_folder(path: Path, word: str, *, write: bool) -> dict[str, Any]:
    """Whether this node sees the submitter's folder, how fast it writes there (with fsync), and whether locks work."""
    if not (path / f".doctor-{word}").is_file():
        return {"sees_folder": False}
    if not write:
        return {"sees_folder": True}
    trial = path / f".doctor-{word}-{platform.node()}"
    block = secrets.token_bytes(2**20)  # not to be compressed away
    begun = time.perf_counter()
    try:
        with trial.open("wb") as file:
            for _ in range(WRITTEN_MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        speed = WRITTEN_MIB / (time.perf_counter() - begun)
        with hold_lock(trial) as has_locks:
            pass
    except OSError as error:
        return {"sees_folder": True, "write_error": str(error.strerror)}
    finally:
        trial.unlink(missing_ok=True)
    return {"sees_folder": True, "write_mib_s": round(speed, 1), "locks": has_locks}


def probe_network(world: World) -> dict[str, Any]:
    """`meets`, `all_reduce_gib_s` and `clock_s` (ahead of rank 0); `network_error` when the ranks do not meet."""
    try:
        with world.connected(timeout_s=MEET_S):
            return {
                "meets": True,
                "clock_s": _clock_s(),
                "all_reduce_gib_s": _all_reduce_gib_s(world),
            }
    except (RuntimeError, OSError) as error:  # torch's DistError is a RuntimeError
        return {"meets": False, "network_error": str(error).splitlines()[0][:200]}


def _clock_s() -> float:
    """Of several rounds the smallest difference: the rest is the way of the message."""
    rounds: list[float] = []
    for _ in range(ROUNDS):
        collectives.barrier()
        times: list[float] = collectives.gather_from_ranks(time.time())
        rounds.append(times[collectives.current_rank()] - times[0])
    return round(sorted(rounds, key=abs)[0], 4)


def _all_reduce_gib_s(world: World) -> float | None:
    """Bus bandwidth, 2 (n - 1) / n bytes / s, https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md"""
    if not world.is_distributed:
        return None
    cuda = world.device.type == "cuda"
    data = torch.ones((256 if cuda else 16) * 2**20 // 4, device=world.device)
    fastest = float("inf")
    for _ in range(ROUNDS):
        collectives.barrier()
        begun = time.perf_counter()
        dist.all_reduce(data, op=dist.ReduceOp.MAX)
        if cuda:
            torch.cuda.synchronize(world.device)
        fastest = min(fastest, time.perf_counter() - begun)
    moved = 2 * (world.world_size - 1) / world.world_size * data.numel() * 4
    return round(moved / fastest / 2**30, 3)


if __name__ == "__main__":
    guard_output_streams()
    sys.exit(main())
