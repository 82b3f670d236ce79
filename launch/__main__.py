"""`python -m launch`: see `launch.submit`."""

import sys

from launch.submit import run

if __name__ == "__main__":
    sys.exit(run())
