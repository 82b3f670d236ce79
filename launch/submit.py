"""`python -m launch.submit COMMAND`: the same as `python -m launch COMMAND` (see `launch.cli`)."""

import sys

from launch.cli import run

if __name__ == "__main__":
    sys.exit(run())
