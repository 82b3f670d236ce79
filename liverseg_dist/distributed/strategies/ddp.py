"""DistributedDataParallel, a single process, and the fixed-order sum giving the same bits on any number of ranks."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from liverseg_dist.distributed.collectives import all_max, world_size
from liverseg_dist.distributed.strategies.base import Strategy, loss_scale


class DataParallel(Strategy):
    """Every rank holds the whole model; gradients are averaged in buckets while backward runs.

    https://arxiv.org/abs/2006.15704
    """

    def __init__(
        self,
        plain: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip_grad_norm: float,
        precision: str,
    ) -> None:
        super().__init__(plain, optimizer, clip_grad_norm, precision)
        self._ddp: nn.Module = plain
        if dist.is_initialized():
            device = next(plain.parameters()).device
            self._ddp = DistributedDataParallel(
                plain,
                device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )

    def settle(self, image_BCDHW: Tensor) -> None:
        """A throw-away backward. DDP lays out its buckets anew after the first one, and with more than two ranks the
        layout decides the order of the sums: without this, step N of a resumed run differs in the last bits."""
        if not isinstance(self._ddp, DistributedDataParallel):
            return
        outputs = self.forward(image_BCDHW, last=True)
        tensors = outputs if isinstance(outputs, list) else [outputs]
        sum(tensor.float().sum() for tensor in tensors).backward()  # type: ignore[union-attr]
        self.skip()

    def forward(self, image_BCDHW: Tensor, *, last: bool) -> Tensor | list[Tensor]:
        if isinstance(self._ddp, DistributedDataParallel):
            self._ddp.require_backward_grad_sync = (
                last  # what `no_sync` sets; DDP reads it in forward
            )
        with self.autocast():
            return self._ddp(image_BCDHW)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss * loss_scale()).backward()


class DeterministicReduction(Strategy):
    """Gradients are kept per micro-batch and added in the order of the run's samples, whoever computed them.

    Float addition is not associative, so an all-reduce's result depends on the number of ranks; this one's does not.
    Needs one sample per micro-batch and the same `train.threads` everywhere. Costs memory for a rank's gradients.
    """

    def __init__(
        self,
        plain: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip_grad_norm: float,
        precision: str,
    ) -> None:
        super().__init__(plain, optimizer, clip_grad_norm, precision)
        self._parameters = [p for p in plain.parameters() if p.requires_grad]
        self._samples: list[Tensor] = []

    def forward(self, image_BCDHW: Tensor, *, last: bool) -> Tensor | list[Tensor]:
        with self.autocast():
            return self.plain(image_BCDHW)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()
        self._samples.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                    for p in self._parameters
                ]
            )
        )
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, learning_rate: float) -> float:
        rounds = all_max(len(self._samples))
        total = torch.zeros_like(self._samples[0])
        for number in range(
            rounds
        ):  # sample n sits on rank n mod W, so round by round is the order of samples
            mine = self._samples[number] if number < len(self._samples) else torch.zeros_like(total)
            theirs = [mine]
            if dist.is_initialized():
                theirs = [torch.empty_like(mine) for _ in range(world_size())]
                dist.all_gather(theirs, mine)
            for gradient in theirs:
                total += gradient
        for parameter, part in zip(
            self._parameters, total.split([p.numel() for p in self._parameters]), strict=True
        ):
            parameter.grad = part.view_as(parameter)
        return super().step(learning_rate)

    def skip(self) -> None:
        self._samples.clear()
        super().skip()
