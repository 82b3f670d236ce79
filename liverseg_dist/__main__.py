"""`python -m liverseg_dist COMMAND` (so that torchrun can start it)."""

import sys

from liverseg_dist.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
