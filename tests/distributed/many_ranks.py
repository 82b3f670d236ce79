"""`python -m tests.distributed.many_ranks RANKS train ...`: ranks of one command, as srun starts them.

They are forked from one interpreter that has imported all it needs: 64 interpreters of their own take 16 GiB, and
minutes to import. From there on each is a rank like any other. The last line tells how many ended with 0, the seconds
and the most memory they held together.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch._decomp
import torch._dynamo  # which DDP and the optimizers import when they are first used
import torch.distributed.checkpoint
import torch.utils.tensorboard  # noqa: F401

import liverseg_dist.commands.train  # noqa: F401 - like the others: before the fork
from liverseg_dist.commands.main import main, run_and_exit

LIMIT_S = 420.0


def rank(number: int, ranks: int, words: list[str]) -> None:
    os.environ |= {
        "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_STEP_NUM_TASKS": str(ranks),
        "SLURM_STEP_TASKS_PER_NODE": str(ranks), "SLURM_STEP_NODELIST": "here", "SLURM_JOB_ID": str(os.getppid()),
    }  # fmt: skip
    run_and_exit(lambda: main(words))


def held_gib(processes: list[int]) -> float:
    """Memory of all, shared pages counted once."""
    total = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 2**20


def run(ranks: int, words: list[str]) -> dict[str, object]:
    begun = time.monotonic()
    processes = []
    for number in range(ranks):
        process = os.fork()
        if process == 0:
            rank(number, ranks, words)
        processes.append(process)
    running, codes, most_gib = set(processes), {}, 0.0
    while running and time.monotonic() - begun < LIMIT_S:
        most_gib = max(most_gib, held_gib(processes))
        time.sleep(1)
        for process in sorted(running):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                running.discard(process)
                codes[process] = os.waitstatus_to_exitcode(status)
    for process in running:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return {
        "ranks": ranks,
        "clean": sum(code == 0 for code in codes.values()),
        "left": len(running),
        "seconds": round(time.monotonic() - begun, 1),
        "most_gib": round(most_gib, 2),
    }


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), sys.argv[2:])), flush=True)
