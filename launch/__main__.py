"""`python -m launch`: see `launch.cli`."""

import sys

from launch.cli import run
from liverseg_dist.streams import guard_output_streams

if __name__ == "__main__":
    guard_output_streams()
    sys.exit(run())
