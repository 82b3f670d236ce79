"""`PackedBuffer`: images, labels and tables of a batch in one block of memory.

One block is one transfer to the GPU. In pinned memory the transfer does not wait for the stream.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from liverseg_dist.data.augment.host_tables import DeviceTables, TableKey, align


@dataclass(frozen=True)
class _Part:
    """A tensor in the block."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view_in(self, block: torch.Tensor) -> torch.Tensor:
        part = block[self.offset : self.offset + self.size_bytes]
        return part.view(self.dtype).view(self.shape)


class PackedBuffer:
    """A block of memory and the tensors in it, which are views.

    Attributes:
        images: int16 (B, C, D, H, W).
        labels: uint8 (B, D, H, W).
        tables: the tables.
    """

    def __init__(
        self, block: torch.Tensor, images: _Part, labels: _Part, tables: Mapping[TableKey, _Part]
    ) -> None:
        self._block = block
        self._parts = (images, labels, tables)
        self.images = images.view_in(block)
        self.labels = labels.view_in(block)
        views = {key: part.view_in(block) for key, part in tables.items()}
        self.tables = DeviceTables(views)

    @classmethod
    def allocate(
        cls,
        image_shape: tuple[int, ...],
        tables: Mapping[TableKey, np.ndarray],
        *,
        pin_memory: bool,
    ) -> Self:
        """Allocate a block; the tables are copied into it, images and labels are not set.

        Args:
            image_shape: (B, C, D, H, W).
            tables: the tables.
            pin_memory: whether the block is in pinned memory.
        """
        images = _Part(0, image_shape, torch.int16)
        label_shape = (image_shape[0], *image_shape[2:])
        labels = _Part(align(images.size_bytes), label_shape, torch.uint8)
        position = align(labels.offset + labels.size_bytes)
        parts = {}
        for key, table in tables.items():
            part = _Part(position, table.shape, torch.from_numpy(table).dtype)
            parts[key] = part
            position = align(position + part.size_bytes)
        block = torch.empty(position, dtype=torch.uint8, pin_memory=pin_memory)
        buffer = cls(block, images, labels, parts)
        for key, table in tables.items():
            buffer.tables.tensors[key].copy_(torch.from_numpy(table))
        return buffer

    def to(self, device: torch.device | str, *, non_blocking: bool) -> "PackedBuffer":
        """Return the buffer on a device, by one transfer."""
        return PackedBuffer(self._block.to(device, non_blocking=non_blocking), *self._parts)
