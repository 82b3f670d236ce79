"""Work that only rank 0 does, with a result or an error that all ranks share."""

from collections.abc import Callable
from typing import Any

from liverseg_dist.distributed.collectives import broadcast_from_rank0, current_rank
from liverseg_dist.errors import LiversegError, RunFailed, os_error_line


def share_from_rank0(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 and return its result on every rank. A collective call.

    Args:
        action: reads or writes files of the run, for example. Its result is pickled.

    Raises:
        LiversegError: `action` failed on rank 0; every rank raises the same error, so that no rank
            waits for the others in the next collective call.
    """
    problem: LiversegError | None = None
    result = None
    if current_rank() == 0:
        try:
            result = action()
        except LiversegError as error:
            problem = error
        except OSError as error:
            problem = RunFailed(os_error_line(error))
    problem, result = broadcast_from_rank0((problem, result))
    if problem is not None:
        raise problem
    return result
