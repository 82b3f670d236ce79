"""Read files that `torch.save` wrote, without running code of the file.

PyTorch's restricted unpickler (`weights_only=True`) makes tensors and plain containers only. The
list `ALLOWED` adds NumPy's numbers, which nnU-Net logs in its checkpoints. Used by `pretrained` and
`nnunet_folder`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from liverseg_dist.errors import UserError


def _list_allowed() -> list[Any]:
    """The types beside tensors that a file may contain."""
    # NumPy 1 and 2 pickle the same function under two names.
    scalar: Callable[..., Any] = np._core.multiarray.scalar  # type: ignore[attr-defined]
    allowed: list[Any] = [np.dtype, scalar, (scalar, "numpy.core.multiarray.scalar")]
    for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_):
        allowed.append(type(np.dtype(kind)))
    return allowed


ALLOWED = _list_allowed()
"""Numbers of NumPy: their type, and the function that makes one from its bytes."""


def read_torch_file(file: Path) -> Any:
    """Read a file of tensors, numbers, texts and containers of them.

    Raises:
        UserError: the file is missing or not readable, or contains other types.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(file, "cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        raise UserError(
            f"{file}: not readable as weights: {' '.join(str(error).split())[:200]}"
        ) from None
    # The unpickler raises several types when it refuses anything but tensors.
    except Exception as error:
        raise UserError(
            f"{file}: contains more than tensors, which is never loaded ({type(error).__name__}). "
            "If you trust it, save only its tensors: torch.save(torch.load(FILE, "
            "weights_only=False)['network_weights'], 'weights.pt')"
        ) from None
