"""`python -m launch.submit COMMAND`: the same as `python -m launch COMMAND` (see `cli`).

Kept for scripts that use the earlier name.
"""

import sys

from .cli import run

if __name__ == "__main__":
    sys.exit(run())
