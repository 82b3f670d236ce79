"""FSDP2: parameters, gradients and optimizer state are sharded over ranks.

It uses torch.distributed.fsdp.fully_shard. Hybrid sharding (HSDP, https://arxiv.org/abs/2304.11277,
section 3.2.2) shards over neighbouring ranks, those of a node, and keeps a copy of the shards in
each such group. Only gradients are then exchanged between nodes, each once.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from liverseg_dist.distributed.strategies.base import Strategy, loss_scale


def apply_fully_shard(plain: nn.Module, ranks_per_shard: int = 0) -> nn.Module:
    """Shard a module in place.

    Call it before the optimizer is built: the parameters become DTensors.

    Args:
        plain: module; its `shard_groups()` are gathered one at a time, then the rest.
        ranks_per_shard: number of neighbouring ranks that share one copy of the state; 0: all
            ranks.

    Returns:
        The same module.
    """
    device_type = next(plain.parameters()).device.type
    ranks = dist.get_world_size()
    if 0 < ranks_per_shard < ranks:
        copies = (ranks // ranks_per_shard, ranks_per_shard)
        mesh = init_device_mesh(device_type, copies, mesh_dim_names=("copies", "shards"))
    else:
        mesh = init_device_mesh(device_type, (ranks,))
    # Small groups, so that only a part of the parameters is gathered at any time.
    for group in plain.shard_groups():  # type: ignore[operator]
        fully_shard(group, mesh=mesh)
    fully_shard(plain, mesh=mesh)
    return plain


class FullyShard(Strategy):
    """Training with FSDP2; the module must have been sharded by `apply_fully_shard`."""

    def __init__(
        self,
        plain: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip_grad_norm: float,
        precision: str,
    ) -> None:
        super().__init__(plain, optimizer, clip_grad_norm, precision)
        assert isinstance(plain, FSDPModule)
        self._fsdp: FSDPModule = plain

    def forward(self, image_BCDHW: Tensor, *, last: bool) -> Tensor | list[Tensor]:
        # Gradients of the earlier micro-batches are summed locally.
        self._fsdp.set_requires_gradient_sync(last)
        with self.autocast():
            return self.plain(image_BCDHW)

    def backward(self, loss: Tensor) -> None:
        (loss * loss_scale()).backward()
