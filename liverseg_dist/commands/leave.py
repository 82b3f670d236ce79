"""The end of a process whose native threads cannot be trusted to come down in order."""

import atexit
import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def run_and_leave(main: Callable[[], int]) -> NoReturn:
    """Call `main` and end with its exit code, after all exit functions but before C++ destructors.

    Those of torch, gloo and DeepSpeed now and then abort ("terminate called without an active exception") a rank whose
    work is done, and torchrun and SLURM then call a finished job failed.
    """
    status = 1

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            # The code is that of the work, also where the stream is closed or `main` has not guarded it.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(status)

    atexit.register(leave)  # the first to be registered is the last to run
    try:
        status = main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    sys.exit(status)
