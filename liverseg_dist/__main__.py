"""`python -m liverseg_dist COMMAND` (so that torchrun can start it)."""

from liverseg_dist.interrupts import handle_interrupts

handle_interrupts()  # before the other imports, so that an early Ctrl-C gives no traceback

from liverseg_dist.commands.main import main, run_and_exit  # noqa: E402

if __name__ == "__main__":
    run_and_exit(main)
