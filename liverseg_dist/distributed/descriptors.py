"""File descriptors of a rank: its connections grow with the number of ranks.

Measured with gloo at 2, 4 and 8 ranks: the process group and the one of the checkpoint writer
needed 20 + 3 N descriptors; with lazy connections a rank opens only those that it uses (14 at 8
ranks instead of 22), except for rank 0, which every rank connects to.
"""

import os
import resource

from liverseg_dist.errors import UserError

LAZY_GLOO_VARIABLE = "TORCH_GLOO_LAZY_INIT"
OWN_DESCRIPTORS = 300
"""For files, libraries, the loader and the GPU."""
DESCRIPTORS_PER_RANK = 5
"""Rank 0: two connections to the key-value store and up to three of gloo for each rank."""


def connect_gloo_lazily() -> None:
    """Let gloo connect two ranks when they first exchange data, not all ranks at the start."""
    os.environ.setdefault(LAZY_GLOO_VARIABLE, "1")


def raise_descriptor_limit(world_size: int) -> None:
    """Raise the soft limit of open files to what a job of `world_size` ranks needs.

    Raises:
        UserError: the hard limit is too small.
    """
    needed = OWN_DESCRIPTORS + DESCRIPTORS_PER_RANK * world_size
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{world_size} ranks need about {needed} open files per process, but the hard limit "
            f"is {hard}; raise it (ulimit -Hn, LimitNOFILE of slurmd) or start fewer ranks"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
