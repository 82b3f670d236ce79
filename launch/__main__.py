"""`python -m launch` is `python -m launch`."""

import sys

from launch.submit import run

if __name__ == "__main__":
    sys.exit(run())
