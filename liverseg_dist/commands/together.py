"""Ranks that share out cases: one line tells why they end early, whichever rank it was."""

import sys
import traceback
from collections.abc import Callable
from typing import Any

from liverseg_dist.distributed.watch import Watch, is_consequence
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import EXIT_FAILED, EXIT_USER, LiversegError, RunFailed, UserError
from liverseg_dist.training.failure import in_one_line

Result = dict[str, Any]


def together(world: World, timeout_s: float, work: Callable[[Watch], Result]) -> Result:
    """`work`, with the ranks connected. What ends it is told by the rank that failed first; where a rank is gone, by
    one that misses it. Raises `UserError`, `RunFailed`; alone, whatever `work` raises.
    """
    with world.connected(timeout_s), Watch(world, timeout_s) as watch:
        try:
            return work(watch)
        except Exception as error:
            if not world.is_distributed:
                raise
            mistake = isinstance(error, UserError)
            line, ours = watch.account(error, in_one_line(error), name_rank=not mistake)
            if not ours:
                return {"error": line, "exit_code": EXIT_USER if mistake else EXIT_FAILED}
            if mistake:
                raise
            if not isinstance(error, (LiversegError, OSError)) and not is_consequence(error):
                traceback.print_exception(error, file=sys.stderr)
            raise RunFailed(f"{line}; run the same line again to continue") from error
