"""Small tables that transforms compute on the host: blur weights, spline weights, positions.

A copy of a table to a GPU from memory that is not pinned waits for the stream. The loader therefore
computes the tables of a batch ahead (`list_tables` of the transforms names them), packs them behind
the voxels of the batch in one pinned buffer, and one transfer moves everything. A table that was
not packed is computed and copied when it is needed: the values are the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

TableKey = tuple[Callable[..., np.ndarray], tuple]
"""A function without side effects and its arguments (hashable), which make a table."""
ALIGNMENT_BYTES = 64
"""Of each part of a packed buffer: the largest vector that a device loads at once."""


@dataclass(frozen=True, eq=False)
class DeviceTables:
    """The tables of a batch on its device."""

    tensors: Mapping[TableKey, torch.Tensor] = field(default_factory=dict)

    def get_table(
        self, device: torch.device, make: Callable[..., np.ndarray], *arguments: object
    ) -> torch.Tensor:
        """Return the table `make(*arguments)` on the device."""
        known = self.tensors.get((make, arguments))
        if known is not None and known.device == device:
            return known
        return torch.from_numpy(make(*arguments)).to(device)


NO_TABLES = DeviceTables()


def compute_tables(keys: Sequence[TableKey]) -> dict[TableKey, np.ndarray]:
    """Compute each table once, although several samples or channels may use it."""
    tables: dict[TableKey, np.ndarray] = {}
    for key in keys:
        if key not in tables:
            make, arguments = key
            tables[key] = make(*arguments)
    return tables


def align(size_bytes: int) -> int:
    """Round a size up to `ALIGNMENT_BYTES`."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
