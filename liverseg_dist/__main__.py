"""`python -m liverseg_dist COMMAND` (so that torchrun can start it)."""

from liverseg_dist.commands.leave import run_and_leave
from liverseg_dist.commands.main import main

if __name__ == "__main__":
    run_and_leave(main)
