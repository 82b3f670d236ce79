"""One node's torchrun inside an srun step: `python -m launch.slurm.torchrun_node RANKS_PER_NODE MODULE ARGUMENTS...`.

srun starts one of these per node; it becomes torchrun with this node's number and the rendezvous of the job. torchrun
itself must not die of the signal by which SLURM asks the ranks to save, so it ignores that.
"""

import os
import signal
import sys

from .. import PACKAGE


def main() -> None:
    ranks_per_node, *module = sys.argv[1:]
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    env = os.environ
    nodes = env.get("SLURM_STEP_NUM_NODES", "1")
    words = [
        "-m",
        "torch.distributed.run",
        f"--nnodes={nodes}",
        f"--nproc-per-node={ranks_per_node}",
    ]
    endpoint = "localhost:0" if nodes == "1" else f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    words += [
        "--rdzv-backend=liverseg",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-conf=rank={env.get('SLURM_NODEID', '0')}",
    ]
    os.execv(sys.executable, [sys.executable, "-u", *words, "-m", f"{PACKAGE}.slurm.rank", *module])


if __name__ == "__main__":
    main()
