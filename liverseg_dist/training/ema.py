"""Exponential moving average of the weights; shards are averaged where they lie."""

import torch
from torch import Tensor, nn


class Ema:
    """shadow <- decay * shadow + (1 - decay) * weights, after each step. `decay` 0: off, holds nothing.

    The decay rises with the number of steps, min(decay, (1 + t) / (10 + t)), so that short runs profit as well.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow: dict[str, Tensor] = {}
        if decay:
            self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        if not self.decay:
            return
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            self.shadow[name].lerp_(parameter.detach(), weight)

    def state(self) -> dict[str, Tensor]:
        return {f"ema.{name}": tensor for name, tensor in self.shadow.items()}

    def weights(self) -> dict[str, Tensor]:
        """Whole averaged weights on the CPU (a collective call where they are sharded)."""
        return {
            name: (t.full_tensor() if hasattr(t, "full_tensor") else t).float().cpu()
            for name, t in self.shadow.items()
        }
