"""How much arithmetic a training step is, and which share of a GPU's peak it uses."""

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
"""Dense 16-bit tensor-core peaks by a part of the device's name, from NVIDIA's data sheets; the first match counts."""
SHARE_OF_16_BIT = {"bf16": 1.0, "fp16": 1.0, "tf32": 0.5}


def sample_flops(config: ModelConfig, patch_size: Sequence[int]) -> int:
    """Of forward and backward of one sample, a multiplication and an addition counting two; nothing is computed.

    Recomputed activations do not count (the definition of MFU: https://arxiv.org/abs/2204.02311, appendix B).
    """
    with torch.device("meta"):
        model, counter = UNet(config), FlopCounterMode(display=False)
        with counter:
            found = model(torch.empty(1, 1, *patch_size))
            outputs = found if isinstance(found, list) else [found]
            sum(output.sum() for output in outputs).backward()
    return int(counter.get_total_flops())


def peak_tflops(device_name: str, precision: str) -> float | None:
    """None where we do not know it: CPUs, unlisted GPUs, fp32."""
    peak = next((value for name, value in PEAK_TFLOPS.items() if name in device_name), None)
    share = SHARE_OF_16_BIT.get(precision)
    return None if peak is None or share is None else peak * share
