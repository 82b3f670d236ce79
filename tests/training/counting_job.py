"""`counting_job.py FOLDER`: each rank saves twice, loads, and prints a line of counts.

opens: shards opened by `load`. plans: global plans that rank 0 computed. descriptors: open files.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch.distributed.checkpoint import default_planner

from liverseg_dist.commands.main import run_and_exit
from liverseg_dist.distributed.collectives import barrier
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.world import World
from liverseg_dist.training.checkpoint import Checkpoints

counts = {"opens": 0, "plans": 0}
safe_open = safetensors.safe_open
create_plan = default_planner.create_default_global_save_plan


def count_open(*arguments: Any, **named: Any) -> Any:
    counts["opens"] += 1
    return safe_open(*arguments, **named)


def count_plan(*arguments: Any, **named: Any) -> Any:
    counts["plans"] += 1
    return create_plan(*arguments, **named)


def main() -> int:
    world = World.from_environment("cpu")
    before = len(os.listdir("/proc/self/fd"))
    with world.connected(60), HeartbeatMonitor(world):
        checkpoints = Checkpoints(Path(sys.argv[1]), keep_last=2)
        tensors = {f"t{number}": torch.full((64, 8), float(number)) for number in range(40)}
        default_planner.create_default_global_save_plan = count_plan
        for step in (1, 2):
            tensors["t3"].fill_(step)
            assert checkpoints.save(step, tensors, {}, wait=True)
        barrier()
        loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        safetensors.safe_open = count_open
        checkpoints.load(2, loaded)
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
        counts["descriptors"] = len(os.listdir("/proc/self/fd")) - before
        line = "counts " + json.dumps({"rank": world.global_rank, **counts})
        # One write per line: with PYTHONUNBUFFERED, print writes each argument and the line end on its own, and
        # the ranks' pieces mix.
        os.write(sys.stdout.fileno(), (line + "\n").encode())
        barrier()
        checkpoints.close()
    return 0


if __name__ == "__main__":
    run_and_exit(main)
