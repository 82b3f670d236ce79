"""Settings of what a rank may use (`memory.*`), for `train.activation_checkpointing=auto` and `liverseg plan`."""

from pydantic import Field

from liverseg_dist.config.base import Section


class MemoryConfig(Section):
    budget_gib: float | None = Field(default=None, gt=0)
    """What a rank may use of its device, all in all; null: the whole GPU (on a CPU a number is needed)."""
    margin_gib: float | None = Field(default=None, ge=0)
    """Of the budget, left for library workspaces, the allocator's gaps and CUDA's context; null: 0.75 GiB + 8 %."""
