"""FSDP2: parameters, gradients and optimizer state are sharded over ranks.

It uses torch.distributed.fsdp.fully_shard. Hybrid sharding (HSDP, https://arxiv.org/abs/2304.11277,
section 3.2.2) shards over neighbouring ranks, those of a node, and keeps a copy of the shards in
each such group. Only gradients are then exchanged between nodes, each once.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from liverseg_dist.config import TrainConfig
from liverseg_dist.distributed.strategies.base import Strategy, loss_scale
from liverseg_dist.precision import find_autocast_dtype


def apply_fully_shard(plain: nn.Module, config: TrainConfig) -> nn.Module:
    """Shard a module in place.

    Call it before the optimizer is built: the parameters become DTensors.

    Args:
        plain: module; its `shard_groups()` are gathered one at a time, then the rest.
        config: settings `train.*`.

    Returns:
        The same module.
    """
    ranks_per_shard = config.fsdp_shard_ranks
    device_type = next(plain.parameters()).device.type
    ranks = dist.get_world_size()
    if 0 < ranks_per_shard < ranks:
        copies = (ranks // ranks_per_shard, ranks_per_shard)
        mesh = init_device_mesh(device_type, copies, mesh_dim_names=("copies", "shards"))
    else:
        mesh = init_device_mesh(device_type, (ranks,))
    # Small groups, so that only a part of the parameters is gathered at any time.
    policy = _choose_number_formats(config)
    for group in plain.shard_groups():  # type: ignore[operator]
        fully_shard(
            group,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=config.fsdp_reshard_after_forward,
        )
    # What is in no group is used at the ends of the network: backward needs it at once.
    fully_shard(plain, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return plain


def _choose_number_formats(config: TrainConfig) -> MixedPrecisionPolicy:
    """Return the formats of gathered parameters and of exchanged gradients.

    The optimizer updates float32 shards. With bf16 the network computes with rounded weights in any
    case (autocast), so that they are rounded before they are gathered: half of the bytes, and no
    copies of complete weights in two formats. Gradients of micro-batches are added in the format of
    the exchange.
    """
    gathered = find_autocast_dtype(config.precision)
    if config.reduce_precision == "bf16":
        exchanged: torch.dtype | None = torch.bfloat16
    else:
        # FSDP would otherwise exchange gradients in the format of the parameters.
        exchanged = None if gathered is None else torch.float32
    return MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=exchanged)


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
