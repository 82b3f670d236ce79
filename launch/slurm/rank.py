"""One rank of a job: runs a module in a child process and reports its end with peak memory.

  srun ... python -m launch.slurm.rank liverseg_dist train ...

srun reports the end of tasks per node, late and out of order, and kills the others after the first
one. So its output does not show which rank died first, and a rank that is killed for its memory
prints nothing itself. The process that stays here is an interpreter of 10 MiB.
"""

import ctypes
import os
import resource
import signal
import sys
from types import FrameType

from liverseg_dist.errors import EXIT_RESUMABLE, EXIT_USER
from liverseg_dist.streams import guard_output_streams

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
"""Constant of Linux's prctl."""


def main(argv: list[str] | None = None) -> int:
    """Run the module and return its exit code, or 128 + the number of the signal."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        print(__doc__, file=sys.stderr)
        return EXIT_USER
    child = os.fork()
    if child == 0:
        # torchrun starts its workers with ignored signals, which an exec would inherit.
        for number in FORWARDED_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        # The module must not survive this process.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.execv(sys.executable, [sys.executable, "-u", "-m", *arguments])

    def forward_signal(number: int, _frame: FrameType | None) -> None:
        os.kill(child, number)

    for number in FORWARDED_SIGNALS:
        signal.signal(number, forward_signal)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, EXIT_RESUMABLE):
        print(_describe_exit(code), file=sys.stderr, flush=True)
    return 128 - code if code < 0 else code


def _describe_exit(code: int) -> str:
    """The line that `failure_report` reads; change both together."""
    ending = f"ended with exit code {code}"
    if code < 0:
        ending = f"was killed by {signal.Signals(-code).name}"
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
    peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return f"liverseg rank {rank} on {os.uname().nodename} {ending}; peak memory {peak_gib:.2f} GiB"


if __name__ == "__main__":
    guard_output_streams()
    sys.exit(main())
