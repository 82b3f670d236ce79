"""Small deterministic networks with the interface of `liverseg_dist.model`."""

import torch
from torch import Tensor, nn


class Threshold(nn.Module):
    """Liver where the input (normalised) is above `liver`, tumour above `tumour`; sharp logits."""

    def __init__(self, liver: float, tumour: float, steepness: float = 40.0) -> None:
        super().__init__()
        self.liver, self.tumour, self.steepness = liver, tumour, steepness

    def forward(self, image_BCDHW: Tensor) -> Tensor:
        liver = (image_BCDHW - self.liver) * self.steepness
        tumour = liver + (image_BCDHW - self.tumour) * self.steepness
        return torch.cat([torch.zeros_like(liver), liver, tumour], dim=1)


class Random(nn.Module):
    """Two convolutions with fixed random weights; the output depends on the position."""

    def __init__(self, channels: int = 3, seed: int = 0, inputs: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Conv3d(inputs, 4, 3, padding=1)
        self.second = nn.Conv3d(4, channels, 3, padding=1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5

    def forward(self, image_BCDHW: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(image_BCDHW)))
