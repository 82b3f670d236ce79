"""Number formats of the network's arithmetic: the one table that training and inference share.

Used by `distributed.strategies` (training), `inference.sliding_window` (prediction) and
`model.memory_trace` (memory estimates).
"""

import torch

from liverseg_dist.config.registry import find_registered

AUTOCAST_DTYPES: dict[str, torch.dtype | None] = {
    "fp32": None,
    "tf32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""16-bit type that autocast uses, by `train.precision` or `inference.precision`; None: float32.

tf32 is float32 whose matrix products round their inputs; it is a global setting of the GPU.
"""


def find_autocast_dtype(precision: str) -> torch.dtype | None:
    """Return autocast's 16-bit type, or None where it is off.

    Raises:
        UserError: unknown precision.
    """
    return find_registered(AUTOCAST_DTYPES, precision, "precision")


def autocast(device_type: str, precision: str) -> torch.autocast:
    """Return the context in which a network computes with this precision."""
    dtype = find_autocast_dtype(precision)
    return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None)
