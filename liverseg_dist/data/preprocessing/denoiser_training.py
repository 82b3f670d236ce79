"""Train the denoiser on noisy scans alone: predict a hidden pixel from its surroundings.

Noise2Void (Krull et al. 2019, https://arxiv.org/abs/1811.10980): hide pixels of the middle slice, ask for their values;
what can be predicted is tissue, what cannot is noise. CT noise is correlated over neighbours in plane (the
reconstruction kernel), so a whole block around each pixel is hidden (Broaddus et al. 2020,
https://doi.org/10.1109/ISBI45749.2020.9098336). Step t of a seed draws the same samples on any machine.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from liverseg_dist.data.preprocessing.denoising_autoencoder import (
    CHANNELS,
    DILATIONS,
    SLICES,
    Denoiser,
    normalise_hu,
    predict_noise,
)

PATCH = 80
TISSUE_HU = (-150, 300)
TRIES = 50


@dataclass(frozen=True)
class DenoiserTraining:
    steps: int = 1500
    batch_size: int = 8
    learning_rate: float = 1e-2
    seed: int = 0
    block_radius: int = 1
    """Pixels hidden around each pixel that is asked for: the reach of the noise's correlation."""
    hidden_share: float = 0.06
    """Share of pixels that are asked for."""


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = [SLICES, *[CHANNELS] * (len(DILATIONS) - 1), 1]
        convolutions = [nn.Conv2d(a, b, 3) for a, b in itertools.pairwise(widths)]
        self.weights = nn.ParameterList([layer.weight for layer in convolutions])
        self.biases = nn.ParameterList([layer.bias for layer in convolutions])

    def forward(self, stack_BSHW: Tensor) -> Tensor:
        return predict_noise(stack_BSHW, list(zip(self.weights, self.biases, strict=True)))


def train_denoiser(
    scans: Sequence[np.ndarray],
    training: DenoiserTraining,
    device: torch.device,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Denoiser:
    """Learn from int16 scans (z, y, x) with slices along z; `progress(step, loss)` after each step."""
    torch.manual_seed(training.seed)
    net = _Net().to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=training.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    for step in range(training.steps):
        rng = np.random.default_rng([training.seed, step])
        stacks = np.stack([draw_patch(scans, rng) for _ in range(training.batch_size)])
        hidden, asked = mask_blind_spots(stacks, rng, training)
        hidden_BSHW, truth_BSHW, asked_BHW = (
            torch.from_numpy(array).to(device) for array in (hidden, stacks, asked)
        )
        middle = SLICES // 2
        answer_BHW = hidden_BSHW[:, middle] - net(hidden_BSHW)
        loss = ((answer_BHW - truth_BSHW[:, middle]) ** 2)[asked_BHW].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step, float(loss.detach()))
    weights, biases = (
        tuple(tensor.detach().cpu().to(torch.float16).numpy() for tensor in tensors)
        for tensors in (net.weights, net.biases)
    )
    return Denoiser(weights, biases)


def draw_patch(scans: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Normalised (SLICES, PATCH, PATCH) around a voxel of soft tissue (any voxel when none is found soon)."""
    scan = scans[int(rng.integers(len(scans)))]
    for _ in range(TRIES):
        z, y, x = (int(rng.integers(n)) for n in scan.shape)
        if TISSUE_HU[0] < scan[z, y, x] < TISSUE_HU[1]:
            break
    reach = SLICES // 2
    at_z = np.clip(np.arange(z - reach, z + reach + 1), 0, scan.shape[0] - 1)
    at_y, at_x = (
        np.clip(np.arange(centre - PATCH // 2, centre + PATCH // 2), 0, size - 1)
        for centre, size in ((y, scan.shape[1]), (x, scan.shape[2]))
    )
    patch = normalise_hu(scan[np.ix_(at_z, at_y, at_x)])
    up, left = (-1 if flip else 1 for flip in rng.random(2) < 0.5)
    return np.ascontiguousarray(patch[:, ::up, ::left])


def mask_blind_spots(
    stacks: np.ndarray, rng: np.random.Generator, training: DenoiserTraining
) -> tuple[np.ndarray, np.ndarray]:
    """(stacks with blocks of the middle slice taken from elsewhere nearby, which pixels are asked for)."""
    radius, middle = training.block_radius, SLICES // 2
    asked = rng.random((len(stacks), *stacks.shape[2:])) < training.hidden_share
    block = np.zeros_like(asked)
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            block |= np.roll(asked, (dy, dx), axis=(1, 2))
    far = int(rng.integers(2 * radius + 1, 3 * radius + 3))
    shift = [(far, 0), (-far, 0), (0, far), (0, -far)][int(rng.integers(4))]
    hidden = stacks.copy()
    hidden[:, middle][block] = np.roll(stacks[:, middle], shift, axis=(1, 2))[block]
    return hidden, asked
