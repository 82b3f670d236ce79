"""A small network that takes noise out of CT slices; trained without clean images by `liverseg denoiser`.

2.5D: it sees a slice and its neighbours, predicts the slice's noise in HU, and is applied slice by slice. A few
thousand weights are enough, so the file is some 20 KB and travels inside the settings (`convert.cleaning.denoiser`):
conversion, training run and inference always use the same one. Tensors only (safetensors); nothing is unpickled.
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
CENTRE_HU, SCALE_HU = 50.0, 150.0
RANGE_HU = (-250.0, 400.0)
"""The network sees HU clipped to this: soft tissue and contrast. What lies outside keeps its value."""

Layers = Sequence[tuple["torch.Tensor", "torch.Tensor"]]
"""(weight, bias) of each convolution."""


@dataclass(frozen=True, eq=False)
class Denoiser:
    """Weights (out, in, 3, 3) and biases (out) of each convolution, float16."""

    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]

    def to_bytes(self) -> bytes:
        tensors = {f"{n}.weight": weight for n, weight in enumerate(self.weights)}
        tensors |= {f"{n}.bias": bias for n, bias in enumerate(self.biases)}
        # One key: safetensors writes several in no fixed order, and equal weights shall give equal bytes.
        return save(
            tensors, {"liverseg_denoiser": json.dumps({"schema": SCHEMA, "dilations": DILATIONS})}
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> "Denoiser":
        """Raises `UserError` for anything that `to_bytes` did not make."""
        try:
            tensors = load(content)
            weights = tuple(tensors[f"{n}.weight"] for n in range(len(DILATIONS)))
            biases = tuple(tensors[f"{n}.bias"] for n in range(len(DILATIONS)))
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"convert.cleaning.denoiser: not a denoiser ({error}); `liverseg denoiser` makes one"
            ) from None
        widths = [SLICES, *[CHANNELS] * (len(DILATIONS) - 1), 1]
        for n, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            if weight.shape != (widths[n + 1], widths[n], 3, 3) or bias.shape != (widths[n + 1],):
                raise UserError(
                    f"convert.cleaning.denoiser: layer {n} has shape {weight.shape}; made by another version"
                )
            if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                raise UserError(
                    f"convert.cleaning.denoiser: layer {n} holds NaN or infinity; train it again"
                )
        return cls(weights, biases)


@lru_cache(maxsize=2)
def load_denoiser(setting: str | None) -> Denoiser:
    """The denoiser that the setting `convert.cleaning.denoiser` carries (see `config.convert`)."""
    if setting is None or not setting.startswith(DATA_URI):
        raise UserError(
            "convert.cleaning.noise=autoencoder needs convert.cleaning.denoiser=FILE (see liverseg denoiser)"
        )
    try:
        content = base64.b64decode(setting.removeprefix(DATA_URI), validate=True)
    except ValueError:
        raise UserError("convert.cleaning.denoiser: damaged; give the file again") from None
    return Denoiser.from_bytes(content)


def predict_noise(stack_BSHW: "torch.Tensor", layers: Layers) -> "torch.Tensor":
    """Noise B H W of the middle slices, in units of the normalised stack."""
    import torch.nn.functional as F  # imported late: conversion without a denoiser does not need torch

    values = stack_BSHW
    for n, ((weight, bias), dilation) in enumerate(zip(layers, DILATIONS, strict=True)):
        padded = F.pad(values, (dilation,) * 4, mode="replicate")
        values = F.conv2d(padded, weight, bias, dilation=dilation)
        if n + 1 < len(DILATIONS):
            values = F.leaky_relu(values, 0.1)
    return values[:, 0]


def normalise_hu(voxels: np.ndarray) -> np.ndarray:
    """HU as the network sees them, float32."""
    return (np.clip(voxels.astype(np.float32), *RANGE_HU) - CENTRE_HU) / SCALE_HU


def apply_denoiser(voxels_zyx: np.ndarray, denoiser: Denoiser, share: float = 1.0) -> np.ndarray:
    """Int16 HU without `share` of the predicted noise; voxels outside RANGE_HU stay as they are."""
    import torch

    layers = [
        (torch.from_numpy(weight.astype(np.float32)), torch.from_numpy(bias.astype(np.float32)))
        for weight, bias in zip(denoiser.weights, denoiser.biases, strict=True)
    ]
    reach = SLICES // 2
    out = np.empty(voxels_zyx.shape, dtype=np.int16)
    with torch.inference_mode():
        for z, image in enumerate(voxels_zyx):
            around = np.clip(np.arange(z - reach, z + reach + 1), 0, len(voxels_zyx) - 1)
            stack = torch.from_numpy(normalise_hu(voxels_zyx[around]))[None]
            noise_hu = predict_noise(stack, layers)[0].numpy() * SCALE_HU
            soft = (image > RANGE_HU[0]) & (image < RANGE_HU[1])
            out[z] = np.where(soft, np.rint(image - share * noise_hu), image)
    return out
