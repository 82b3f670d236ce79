"""Start of a command that runs on several ranks: its rank, its device and its output.

Output is made rank-aware here, once: afterwards each command writes its results and its progress
without asking for the rank. `logging_setup` does the same for log records.
"""

import logging

from liverseg_dist import console
from liverseg_dist.distributed.world import World

_logger = logging.getLogger(__name__)


def start_rank(device: str) -> World:
    """Read the rank of this process from the environment, bind it to CPU cores, and silence it unless
    it is rank 0.

    Call it before anything is written: all ranks write the same results.

    Args:
        device: auto, cpu or cuda.

    Raises:
        UserError: The environment is incomplete, or there is no GPU for this rank.
    """
    world = World.from_environment(device).with_cpu_binding()
    if not world.is_main:
        console.silence_process()
    _logger.debug(
        "rank %d of %d on %s, started by %s",
        world.global_rank,
        world.world_size,
        world.device,
        world.launched_by,
    )
    return world
