"""The few collectives the trainer needs, the same calls with one process or many.

Every rank must reach each of them in the same order; none stands behind a per-rank condition.
"""

from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def current_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over ranks (in place where there are several), on the tensor's own device."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_max(value: int) -> int:
    """The largest of the ranks' integers; runs over gloo, so it needs no GPU."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor.item())


def gather_from_ranks(value: Any) -> list[Any]:
    """Each rank's small object, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from_rank0(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    if dist.is_initialized():
        all_max(0)


def broadcast_module(module: torch.nn.Module) -> None:
    """Rank 0's parameters and buffers on every rank."""
    if dist.is_initialized():
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, src=0)
