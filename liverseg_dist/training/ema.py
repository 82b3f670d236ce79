"""Exponential moving average of the weights. Sharded weights are averaged shard by shard."""

import torch
from torch import Tensor, nn


class Ema:
    """shadow <- decay * shadow + (1 - decay) * weights, after each step.

    The decay rises with the number of steps t, as min(decay, (1 + t) / (10 + t)), so that the
    average of a short run is not dominated by the initial weights.

    Args:
        model: the model after the strategy has prepared it.
        decay: 0 switches the average off; it then needs no memory.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow: dict[str, Tensor] = {}
        if decay:
            self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Add the weights after step `step` (from 0) to the average."""
        if not self.decay:
            return
        # In place and per shard: no communication is needed.
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        shadows, parameters = [], []
        for name, parameter in model.named_parameters():
            shadows.append(_local_shard(self.shadow[name]))
            parameters.append(_local_shard(parameter.detach()))
        # One call for all parameters: on a GPU a few kernels instead of one for each tensor.
        torch._foreach_lerp_(shadows, parameters, weight)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors for a checkpoint; loading overwrites them in place."""
        return {f"ema.{name}": tensor for name, tensor in self.shadow.items()}

    def weights(self) -> dict[str, Tensor]:
        """Return the averaged weights, complete, float32 on the CPU.

        A collective call if they are sharded.
        """
        weights = {}
        for name, tensor in self.shadow.items():
            complete = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            weights[name] = complete.float().cpu()
        return weights


def _local_shard(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor itself; both share their memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
