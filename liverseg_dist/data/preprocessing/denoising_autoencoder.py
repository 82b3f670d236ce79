"""A small network that removes noise from CT slices, trained by `liverseg denoiser`.

The network is 2.5D: from a slice and its neighbours it predicts the noise of the slice in HU. A few
thousand weights are enough, so its file has about 20 KB and is kept inside the settings
(`convert.cleaning.denoiser`): conversion, training and inference always use the same network. The
file holds tensors only (safetensors); nothing is unpickled.

Shapes: B batch, S slices, H height, W width.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from liverseg_dist.config.convert import DATA_URI
from liverseg_dist.errors import UserError

if TYPE_CHECKING:
    import torch

SCHEMA = 1
SLICES = 3
CHANNELS = 16
DILATIONS = (1, 2, 4, 1)
LEAKY_SLOPE = 0.1
CENTRE_HU, SCALE_HU = 50.0, 150.0
RANGE_HU = (-250.0, 400.0)
"""The input is clipped to this range: soft tissue and contrast. Voxels outside keep their value."""
SETTING = "convert.cleaning.denoiser"

Layers = Sequence[tuple["torch.Tensor", "torch.Tensor"]]
"""(weight, bias) of each convolution."""


def layer_widths() -> list[int]:
    """Channels before the first convolution and after each."""
    hidden = [CHANNELS] * (len(DILATIONS) - 1)
    return [SLICES, *hidden, 1]


@dataclass(frozen=True, eq=False)
class Denoiser:
    """Weights (out, in, 3, 3) and biases (out) of each convolution, float16."""

    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]

    def to_bytes(self) -> bytes:
        """The content of a denoiser file; equal weights give equal bytes."""
        tensors = {}
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            tensors[f"{number}.weight"] = weight
            tensors[f"{number}.bias"] = bias
        # One metadata key only: safetensors writes several in no fixed order.
        description = json.dumps({"schema": SCHEMA, "dilations": DILATIONS})
        return save(tensors, {"liverseg_denoiser": description})

    @classmethod
    def from_bytes(cls, content: bytes) -> "Denoiser":
        """Inverse of `to_bytes`.

        Raises:
            UserError: The content is not a valid denoiser.
        """
        numbers = range(len(DILATIONS))
        try:
            tensors = load(content)
            weights = tuple(tensors[f"{number}.weight"] for number in numbers)
            biases = tuple(tensors[f"{number}.bias"] for number in numbers)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{SETTING}: not a denoiser ({error}); create one with `liverseg denoiser`"
            ) from None
        # The shapes are checked here, because a wrong one would fail deep inside a worker process.
        widths = layer_widths()
        for number, weight, bias in zip(numbers, weights, biases, strict=True):
            outputs, inputs = widths[number + 1], widths[number]
            if weight.shape != (outputs, inputs, 3, 3) or bias.shape != (outputs,):
                raise UserError(
                    f"{SETTING}: layer {number} has shape {weight.shape}; "
                    "the file was made by another version, train it again"
                )
            if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                raise UserError(
                    f"{SETTING}: layer {number} contains NaN or infinity; train it again"
                )
        return cls(weights, biases)


@lru_cache(maxsize=2)
def load_denoiser(setting: str | None) -> Denoiser:
    """The denoiser in the setting `convert.cleaning.denoiser` (a data URI, see `config.convert`).

    Raises:
        UserError: The setting is missing or damaged.
    """
    if setting is None or not setting.startswith(DATA_URI):
        raise UserError(
            f"convert.cleaning.noise=autoencoder needs {SETTING}=FILE; "
            "create the file with `liverseg denoiser`"
        )
    try:
        content = base64.b64decode(setting.removeprefix(DATA_URI), validate=True)
    except ValueError:
        raise UserError(f"{SETTING}: damaged; give the file again") from None
    return Denoiser.from_bytes(content)


def predict_noise(stack_BSHW: "torch.Tensor", layers: Layers) -> "torch.Tensor":
    """Noise (B, H, W) of the middle slices, in units of the normalised stack."""
    # Imported here: conversion without a denoiser does not need torch, which is slow to import.
    import torch.nn.functional as F

    values = stack_BSHW
    last = len(DILATIONS) - 1
    for number, ((weight, bias), dilation) in enumerate(zip(layers, DILATIONS, strict=True)):
        # The border is repeated, as in training, so that the edge of a slice is not darkened.
        padded = F.pad(values, (dilation,) * 4, mode="replicate")
        values = F.conv2d(padded, weight, bias, dilation=dilation)
        if number < last:
            values = F.leaky_relu(values, LEAKY_SLOPE)
    return values[:, 0]


def normalise_hu(voxels: np.ndarray) -> np.ndarray:
    """Input of the network from HU: clipped, centred and scaled; float32."""
    return (np.clip(voxels.astype(np.float32), *RANGE_HU) - CENTRE_HU) / SCALE_HU


def apply_denoiser(voxels_zyx: np.ndarray, denoiser: Denoiser, share: float = 1.0) -> np.ndarray:
    """Subtract a share of the predicted noise; voxels outside RANGE_HU stay as they are.

    Args:
        voxels_zyx: Int16 HU.
        denoiser: The trained network.
        share: Share of the noise that is subtracted, at most 1.

    Returns:
        Int16 HU.
    """
    import torch

    layers = []
    for weight, bias in zip(denoiser.weights, denoiser.biases, strict=True):
        weight_32, bias_32 = weight.astype(np.float32), bias.astype(np.float32)
        layers.append((torch.from_numpy(weight_32), torch.from_numpy(bias_32)))
    neighbours = SLICES // 2
    out = np.empty(voxels_zyx.shape, dtype=np.int16)
    with torch.inference_mode():
        for z, image in enumerate(voxels_zyx):
            # The first and the last slice are repeated beyond the ends of the scan.
            stack_z = np.arange(z - neighbours, z + neighbours + 1)
            stack_z = np.clip(stack_z, 0, len(voxels_zyx) - 1)
            stack = torch.from_numpy(normalise_hu(voxels_zyx[stack_z]))[None]
            noise_hu = predict_noise(stack, layers)[0].numpy() * SCALE_HU
            # Bone, air and metal have no noise that matters for soft tissue.
            is_in_range = (image > RANGE_HU[0]) & (image < RANGE_HU[1])
            out[z] = np.where(is_in_range, np.rint(image - share * noise_hu), image)
    return out
