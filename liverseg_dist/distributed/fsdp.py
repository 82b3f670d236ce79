"""FSDP2: parameters, gradients and optimizer state sharded over ranks (torch.distributed.fsdp.fully_shard)."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from liverseg_dist.distributed.strategy import Strategy, loss_scale


def shard(plain: nn.Module) -> nn.Module:
    """Shard `plain` in place, one group for each module that it names in `shard_groups()`, then the rest.

    Must come before the optimizer is made: the parameters become DTensors.
    """
    device_type = next(plain.parameters()).device.type
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for group in plain.shard_groups():  # type: ignore[operator]
        fully_shard(group, mesh=mesh)
    fully_shard(plain, mesh=mesh)
    return plain


class FullyShard(Strategy):
    """The module must have gone through `shard` already."""

    def __init__(
        self, plain: nn.Module, optimizer: torch.optim.Optimizer, clip_grad_norm: float, precision: str
    ) -> None:
        super().__init__(plain, optimizer, clip_grad_norm, precision)
        assert isinstance(plain, FSDPModule)
        self._fsdp: FSDPModule = plain

    def forward(self, image_BCDHW: Tensor, *, last: bool) -> Tensor | list[Tensor]:
        self._fsdp.set_requires_gradient_sync(last)
        with self.autocast():
            return self.plain(image_BCDHW)

    def backward(self, loss: Tensor) -> None:
        (loss * loss_scale()).backward()
