"""One rank of a job: runs a module in a child process and tells its death at once, with rank, node and peak memory.

  srun ... python -m launch.slurm.rank liverseg_dist train ...

srun reports deaths per node, late and out of order, and after the first one kills the rest, so who died first cannot be
read from it; and a rank killed for its memory says nothing at all. What stays here is an interpreter of 10 MiB.
"""

import ctypes
import os
import resource
import signal
import sys
from types import FrameType

from liverseg_dist.errors import EXIT_RESUMABLE
from liverseg_dist.streams import guard_output_streams

PASSED_ON = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    child = os.fork()
    if child == 0:
        for number in PASSED_ON:  # torchrun's are ignored, which a new program would inherit
            signal.signal(number, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # does not outlive this process
        os.execv(sys.executable, [sys.executable, "-u", "-m", *arguments])

    def pass_on(number: int, _frame: FrameType | None) -> None:
        os.kill(child, number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, EXIT_RESUMABLE):
        print(_told(code), file=sys.stderr, flush=True)
    return 128 - code if code < 0 else code


def _told(code: int) -> str:
    how = (
        f"was killed by {signal.Signals(-code).name}"
        if code < 0
        else f"ended with exit code {code}"
    )
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
    peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return f"liverseg rank {rank} on {os.uname().nodename} {how}; peak memory {peak_gib:.2f} GiB"


if __name__ == "__main__":
    guard_output_streams()
    sys.exit(main())
