"""`failing_job.py FOLDER HOW WHERE`: three ranks, one of which fails, with a regular end that blocks.

HOW: raise, loop (busy, but alive), stop (SIGSTOP), kill (SIGKILL). WHERE the others wait: gloo (in
a collective call) or native (in a call that no other rank can interrupt, like a lost NCCL kernel).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from liverseg_dist.commands.main import run_and_exit
from liverseg_dist.commands.run_distributed import run_distributed
from liverseg_dist.distributed import heartbeat
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.process_groups import set_collective_timeout
from liverseg_dist.distributed.world import World

LIMIT_S = 4.0
FAILING_RANK = int(os.environ.get("FAILING_RANK", "1"))


def main() -> int:
    folder, how, where = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    # As NCCL's after the failure of one rank.
    dist.destroy_process_group = lambda *_: time.sleep(600)
    heartbeat.PEER_GRACE_S = heartbeat.FORCED_EXIT_S = 2.0
    world = World.from_environment("cpu")

    def work(monitor: HeartbeatMonitor) -> dict[str, object]:
        for step in range(1000):
            monitor.report_progress(step, "in forward")
            if step == 3:
                set_collective_timeout(LIMIT_S)
                monitor.limit_steps(LIMIT_S)
                if world.global_rank == FAILING_RANK:
                    (folder / "failed_at").write_text(json.dumps(time.time()))
                    fail(how)
                elif where == "native":
                    monitor.report_progress(step, "in backward")
                    time.sleep(600)
            monitor.report_progress(step, "in backward")
            dist.all_reduce(torch.ones(8))
            time.sleep(0.05)
        return {}

    result = run_distributed(world, 60, folder, work)
    return int(str(result.get("exit_code", 0)))


def fail(how: str) -> None:
    if how == "raise":
        raise ValueError("the number is odd")
    if how == "loop":
        time.sleep(600)
    os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)


if __name__ == "__main__":
    run_and_exit(main)
