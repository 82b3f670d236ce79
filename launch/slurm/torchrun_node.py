"""torchrun on one node of an srun step.

  srun ... python -m launch.slurm.torchrun_node RANKS_PER_NODE MODULE ARGUMENTS...

srun starts one of these per node. It becomes torchrun with the number of this node and the
rendezvous of the job. SLURM's signal that asks the ranks to save reaches torchrun as well; it must
not end torchrun, so it is ignored here.
"""

import os
import signal
import sys

from .. import PACKAGE


def main() -> None:
    """Replace this process with torchrun."""
    ranks_per_node, *module = sys.argv[1:]
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    env = os.environ
    nodes = env.get("SLURM_STEP_NUM_NODES", "1")
    # On one node torchrun chooses a free port.
    endpoint = "localhost:0" if nodes == "1" else f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    options = [
        f"--nnodes={nodes}",
        f"--nproc-per-node={ranks_per_node}",
        "--rdzv-backend=liverseg",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-conf=rank={env.get('SLURM_NODEID', '0')}",
    ]
    torchrun = [sys.executable, "-u", "-m", "torch.distributed.run", *options]
    os.execv(sys.executable, [*torchrun, "-m", f"{PACKAGE}.slurm.rank", *module])


if __name__ == "__main__":
    main()
