"""Floating-point operations of a training step, and the peak rates of GPUs.

The ratio of the two is the model FLOPs utilisation (MFU) in the training log.
"""

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from liverseg_dist.config import ModelConfig
from liverseg_dist.model.unet import UNet

PEAK_TFLOPS = {
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "A40": 149.7,
    "RTX A6000": 154.8,
    "L4": 121.0,
    "V100": 125.0,
}
"""Dense 16-bit tensor-core peaks by a part of the device's name, from NVIDIA's data sheets.

The first match counts.
"""
SHARE_OF_16_BIT = {"bf16": 1.0, "fp16": 1.0, "tf32": 0.5}
"""Peak by precision, relative to 16 bits; fp32 does not use tensor cores."""


def sample_flops(config: ModelConfig, patch_size: Sequence[int]) -> int:
    """Return the operations of forward and backward of one sample.

    A multiplication and an addition are two operations. Recomputed activations do not count, as in
    the definition of MFU (https://arxiv.org/abs/2204.02311, appendix B).

    Args:
        config: settings `model.*` with the topology filled in.
        patch_size: (z, y, x) in voxels.
    """
    # On the meta device nothing is computed and no memory is used.
    with torch.device("meta"):
        model, counter = UNet(config), FlopCounterMode(display=False)
        with counter:
            result = model(torch.empty(1, model.in_channels, *patch_size))
            # With deep supervision the lower outputs are part of the work, too.
            outputs = result if isinstance(result, list) else [result]
            sum(output.sum() for output in outputs).backward()
    return int(counter.get_total_flops())


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Return the peak rate in TFLOP/s; None for CPUs, unlisted GPUs and fp32."""
    peak = next((value for name, value in PEAK_TFLOPS.items() if name in device_name), None)
    share = SHARE_OF_16_BIT.get(precision)
    return None if peak is None or share is None else peak * share
