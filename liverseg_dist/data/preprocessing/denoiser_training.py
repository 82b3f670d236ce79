"""Trains the denoiser on noisy scans alone: it predicts a hidden pixel from its surroundings.

Noise2Void (Krull et al. 2019, https://arxiv.org/abs/1811.10980): pixels of the middle slice are
hidden and their values are predicted. Tissue can be predicted from the surroundings, noise cannot.
The reconstruction kernel correlates CT noise in plane, so a block around each pixel is hidden too
(Broaddus et al. 2020, https://doi.org/10.1109/ISBI45749.2020.9098336). A step draws the same
samples on any machine for the same seed.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from liverseg_dist.data.preprocessing.denoising_autoencoder import (
    SLICES,
    Denoiser,
    layer_widths,
    normalise_hu,
    predict_noise,
)

PATCH = 80
"""Height and width of a training patch in pixels."""
TISSUE_HU = (-150, 300)
MAX_TRIES = 50


@dataclass(frozen=True)
class DenoiserTraining:
    """Hyperparameters of `train_denoiser`."""

    steps: int = 1500
    batch_size: int = 8
    learning_rate: float = 1e-2
    seed: int = 0
    block_radius: int = 1
    """Pixels hidden around each predicted pixel: the range over which the noise is correlated."""
    hidden_share: float = 0.06
    """Share of pixels that are predicted."""


class DenoiserNet(nn.Module):
    """The trainable form of a `Denoiser`."""

    def __init__(self) -> None:
        super().__init__()
        layers = []
        for inputs, outputs in itertools.pairwise(layer_widths()):
            layers.append(nn.Conv2d(inputs, outputs, 3))
        self.weights = nn.ParameterList([layer.weight for layer in layers])
        self.biases = nn.ParameterList([layer.bias for layer in layers])

    def forward(self, stack_BSHW: Tensor) -> Tensor:
        return predict_noise(stack_BSHW, list(zip(self.weights, self.biases, strict=True)))

    def to_denoiser(self) -> Denoiser:
        """The weights as float16, as they are stored."""
        return Denoiser(_to_float16(self.weights), _to_float16(self.biases))


def _to_float16(tensors: nn.ParameterList) -> tuple[np.ndarray, ...]:
    return tuple(tensor.detach().cpu().to(torch.float16).numpy() for tensor in tensors)


def _ignore_progress(step: int, loss: float) -> None:
    """Default of `on_step`."""


def train_denoiser(
    scans: Sequence[np.ndarray],
    training: DenoiserTraining,
    device: torch.device,
    on_step: Callable[[int, float], None] = _ignore_progress,
) -> Denoiser:
    """Train a denoiser.

    Args:
        scans: Int16 HU (z, y, x) with slices along z.
        training: Hyperparameters.
        device: Where the network is trained.
        on_step: Called with step and loss after each step.
    """
    # Two runs with one seed must give the same file.
    # For the initial weights; the samples have generators of their own.
    torch.manual_seed(training.seed)
    net = DenoiserNet().to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=training.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    middle = SLICES // 2
    for step in range(training.steps):
        # A generator of its own for each step: samples do not depend on what was drawn before.
        rng = np.random.default_rng([training.seed, step])
        stacks = np.stack([draw_patch(scans, rng) for _ in range(training.batch_size)])
        masked, is_predicted = mask_blind_spots(stacks, rng, training)
        masked_BSHW = torch.from_numpy(masked).to(device)
        # Only the middle slice is the target; the neighbours are context.
        target_BHW = torch.from_numpy(stacks).to(device)[:, middle]
        is_predicted_BHW = torch.from_numpy(is_predicted).to(device)
        prediction_BHW = masked_BSHW[:, middle] - net(masked_BSHW)
        loss = ((prediction_BHW - target_BHW) ** 2)[is_predicted_BHW].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step(step, float(loss.detach()))
    return net.to_denoiser()


def draw_patch(scans: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A random patch, centred on soft tissue if a voxel of it is found within MAX_TRIES draws.

    Returns:
        Normalised HU (SLICES, PATCH, PATCH), float32.
    """
    scan = scans[int(rng.integers(len(scans)))]
    depth, height, width = scan.shape
    # Air and bone fill most of a scan, and the denoiser does not change them.
    for _ in range(MAX_TRIES):
        z, y, x = (int(rng.integers(n)) for n in scan.shape)
        if TISSUE_HU[0] < scan[z, y, x] < TISSUE_HU[1]:
            break
    neighbours, half = SLICES // 2, PATCH // 2
    # Beyond the scan the border is repeated.
    patch_z = np.clip(np.arange(z - neighbours, z + neighbours + 1), 0, depth - 1)
    patch_y = np.clip(np.arange(y - half, y + half), 0, height - 1)
    patch_x = np.clip(np.arange(x - half, x + half), 0, width - 1)
    patch = normalise_hu(scan[np.ix_(patch_z, patch_y, patch_x)])
    # Mirroring doubles the samples; noise has no preferred side.
    step_y, step_x = (-1 if flip else 1 for flip in rng.random(2) < 0.5)
    return np.ascontiguousarray(patch[:, ::step_y, ::step_x])


def mask_blind_spots(
    stacks: np.ndarray, rng: np.random.Generator, training: DenoiserTraining
) -> tuple[np.ndarray, np.ndarray]:
    """Hide blocks of the middle slice by values from elsewhere in the neighbourhood.

    Args:
        stacks: Normalised patches (B, S, H, W).
        rng: Source of randomness.
        training: Size of the blocks and share of predicted pixels.

    Returns:
        (masked stacks, boolean (B, H, W): which pixels are predicted).
    """
    radius, middle = training.block_radius, SLICES // 2
    # Few pixels: their neighbours must stay visible to predict them.
    is_predicted = rng.random((len(stacks), *stacks.shape[2:])) < training.hidden_share
    is_hidden = np.zeros_like(is_predicted)
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            is_hidden |= np.roll(is_predicted, (dy, dx), axis=(1, 2))
    # Far enough that the replacement comes from outside the hidden block.
    distance = int(rng.integers(2 * radius + 1, 3 * radius + 3))
    directions = [(distance, 0), (-distance, 0), (0, distance), (0, -distance)]
    shift = directions[int(rng.integers(4))]
    masked = stacks.copy()
    masked[:, middle][is_hidden] = np.roll(stacks[:, middle], shift, axis=(1, 2))[is_hidden]
    return masked, is_predicted
