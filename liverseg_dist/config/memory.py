"""Settings of the memory budget of a rank (`memory.*`).

`train.activation_checkpointing=auto` and `liverseg plan` use them.
"""

from pydantic import Field

from liverseg_dist.config.base import Section


class MemoryConfig(Section):
    budget_gib: float | None = Field(default=None, gt=0)
    """Memory of its device that a rank may use in total; null: the whole GPU (on a CPU, give a
    number)."""
    margin_gib: float | None = Field(default=None, ge=0)
    """Part of the budget reserved for library workspaces, allocator fragmentation and the CUDA
    context; null: 0.75 GiB + 8 %."""
