"""`python -m liverseg_dist COMMAND` (so that torchrun can start it)."""

from liverseg_dist.interrupts import handle_interrupts

handle_interrupts()  # before the other imports: an early Ctrl-C needs no traceback

from liverseg_dist.commands.leave import run_and_leave  # noqa: E402
from liverseg_dist.commands.main import main  # noqa: E402

if __name__ == "__main__":
    run_and_leave(main)
