"""DistributedDataParallel, a single process, and a gradient sum in a fixed order.

The fixed order gives the same bits on any number of ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from liverseg_dist.distributed.collectives import all_max, world_size
from liverseg_dist.distributed.strategies.base import Strategy, loss_scale


class DataParallel(Strategy):
    """Every rank has the complete model; gradients are averaged in buckets during backward.

    https://arxiv.org/abs/2006.15704

    Args:
        plain: as for `Strategy`, as the next three.
        optimizer: optimizer of the module's parameters.
        clip_grad_norm: largest norm of the gradient.
        precision: setting `train.precision`.
        is_static: setting `train.ddp_static_graph`.
        reduce_precision: setting `train.reduce_precision`.
    """

    def __init__(
        self,
        plain: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip_grad_norm: float,
        precision: str,
        *,
        is_static: bool = False,
        reduce_precision: str = "fp32",
    ) -> None:
        super().__init__(plain, optimizer, clip_grad_norm, precision)
        self._ddp: nn.Module = plain
        if dist.is_initialized():
            device = next(plain.parameters()).device
            ddp = DistributedDataParallel(
                plain,
                # DDP refuses device numbers for modules on a CPU.
                device_ids=[device.index] if device.type == "cuda" else None,
                # The gradients are views of the buckets: no second copy, and no copy back.
                gradient_as_bucket_view=True,
                static_graph=is_static,
            )
            if reduce_precision == "bf16":
                ddp.register_comm_hook(None, _average_in_bf16)
            self._ddp = ddp

    def warm_up(self, image_BCDHW: Tensor) -> None:
        """Run one backward and discard its gradients.

        DDP arranges its buckets again after the first backward. With more than two ranks the
        arrangement determines the order of the sums, so that without this call step N of a resumed
        run would differ in the last bits.
        """
        if not isinstance(self._ddp, DistributedDataParallel):
            return
        outputs = self.forward(image_BCDHW, last=True)
        tensors = outputs if isinstance(outputs, list) else [outputs]
        sum(tensor.float().sum() for tensor in tensors).backward()  # type: ignore[union-attr]
        self.skip()

    def forward(self, image_BCDHW: Tensor, *, last: bool) -> Tensor | list[Tensor]:
        if isinstance(self._ddp, DistributedDataParallel):
            # What the context manager `no_sync` sets; DDP reads it in forward.
            self._ddp.require_backward_grad_sync = last
        with self.autocast():
            return self._ddp(image_BCDHW)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss * loss_scale()).backward()


def _average_in_bf16(_state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients over the ranks in bfloat16; a communication hook of DDP.

    As torch's `bf16_compress_hook`, which DDP refuses without a GPU.
    """
    gradients = bucket.buffer()
    rounded = gradients.to(torch.bfloat16).div_(world_size())
    work = dist.all_reduce(rounded, async_op=True)

    def copy_back(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        return gradients.copy_(future.value()[0])

    return work.get_future().then(copy_back)


class DeterministicReduction(Strategy):
    """Gradients are stored per micro-batch and added in the order of the run's samples.

    Floating-point addition is not associative, so the result of an all-reduce depends on the number
    of ranks; this sum does not. It needs one sample per micro-batch, the same `train.threads` on
    all ranks, and memory for all gradients of a rank.
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
        parts = []
        for parameter in self._parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parts.append(gradient.flatten())
        self._samples.append(torch.cat(parts))
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, learning_rate: float, *, skip_if: Tensor | None = None) -> Tensor:
        # Ranks may have different numbers of samples; all_gather needs the same number of calls.
        rounds = all_max(len(self._samples))
        total = torch.zeros_like(self._samples[0])
        # Sample n is on rank n mod W, so this loop follows the order of the samples.
        for number in range(rounds):
            own = self._samples[number] if number < len(self._samples) else torch.zeros_like(total)
            gathered = [own]
            if dist.is_initialized():
                gathered = [torch.empty_like(own) for _ in range(world_size())]
                dist.all_gather(gathered, own)
            for gradient in gathered:
                total += gradient
        sizes = [parameter.numel() for parameter in self._parameters]
        for parameter, part in zip(self._parameters, total.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        return super().step(learning_rate, skip_if=skip_if)

    def skip(self) -> None:
        self._samples.clear()
        super().skip()
