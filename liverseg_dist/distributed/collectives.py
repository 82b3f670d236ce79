"""Collective calls of the project, usable with one process and with several.

Every rank must call each of them in the same order. None may be called behind a condition that
differs between ranks.
"""

from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def current_rank() -> int:
    """Global rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def begin_sum(values: torch.Tensor) -> dist.Work | None:
    """Start to sum a tensor element by element over all ranks, in place.

    Args:
        values: tensor on the device of the process group.

    Returns:
        What to wait for before the sum is used; None with one process. On a GPU, waiting holds up
        the current stream and not the host.
    """
    return dist.all_reduce(values, async_op=True) if dist.is_initialized() else None


def all_max(value: int) -> int:
    """Return the largest value over all ranks. It uses gloo (a CPU tensor), so it needs no GPU."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor.item())


def gather_from_ranks(value: Any) -> list[Any]:
    """Return the objects of all ranks, in rank order, on every rank. For small objects: they are
    pickled."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from_rank0(value: Any) -> Any:
    """Return rank 0's object on every rank. For small objects: it is pickled."""
    if not dist.is_initialized():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def barrier() -> None:
    """Wait until every rank has called this function."""
    if dist.is_initialized():
        # Not dist.barrier: with NCCL it would allocate memory on GPU 0 for each rank.
        all_max(0)


def broadcast_module(module: torch.nn.Module) -> None:
    """Copy rank 0's parameters and buffers to every rank, in place."""
    if not dist.is_initialized():
        return
    for tensor in [*module.parameters(), *module.buffers()]:
        dist.broadcast(tensor.data, src=0)
