"""Distributed training of 3D liver-tumour segmentation on CT (Medical Segmentation Decathlon,
Task03_Liver).

From Python: `open_store`, `iterate_cases`, `iterate_batches`, `load_model`, `predict` (see
`liverseg_dist.api`).
"""

import importlib
from typing import Any

__version__ = "0.1.0"
# Imported on first use, so that `import liverseg_dist` does not import torch.
_FROM_API = ("iterate_batches", "iterate_cases", "load_model", "open_store", "predict")
__all__ = ["__version__", *_FROM_API]


def __getattr__(name: str) -> Any:
    if name not in _FROM_API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("liverseg_dist.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_FROM_API})
