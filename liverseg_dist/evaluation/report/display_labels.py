"""How pictures show a label scheme: which voxels are compared, and which outlines are drawn.

The lesions of a scheme are compared voxel by voxel, because they are what the pictures are looked
at for; organs are shown by their outlines. Without lesions all structures are compared, and only
wrong voxels are filled.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from liverseg_dist.labels import LARGEST_VALUE, LITS_SCHEME, LabelScheme

MAX_CLASSES = 16
"""The codes of both masks share one byte. Classes beyond it share codes with earlier ones."""


@dataclass(frozen=True)
class DisplayLabels:
    """A label scheme, reduced to at most `MAX_CLASSES` codes for display."""

    labels: LabelScheme = LITS_SCHEME

    @cached_property
    def num_codes(self) -> int:
        return min(self._num_classes, MAX_CLASSES)

    @cached_property
    def _num_classes(self) -> int:
        return 1 + max(value for structure in self.labels.structures for value in structure.values)

    @cached_property
    def code_of(self) -> np.ndarray:
        """Code of each label value: uint8 (256); values that are no structure have 0."""
        codes = np.zeros(LARGEST_VALUE + 1, dtype=np.uint8)
        for structure in self.labels.structures:
            for value in structure.values:
                codes[value] = (value - 1) % (MAX_CLASSES - 1) + 1
        return codes

    @cached_property
    def has_lesions(self) -> bool:
        return bool(self.labels.lesions)

    @cached_property
    def compared(self) -> tuple[int, ...]:
        """Codes whose voxels are compared: those of lesions, else all."""
        structures = self.labels.lesions or self.labels.structures
        return self._codes_of(value for entry in structures for value in entry.values)

    @cached_property
    def outlines(self) -> tuple[tuple[int, ...], ...]:
        """Codes of each structure; the edge of their union is its outline."""
        return tuple(self._codes_of(entry.values) for entry in self.labels.structures)

    def encode(self, label: np.ndarray) -> np.ndarray:
        """Codes (uint8) of a label array of any shape."""
        return np.asarray(self.code_of[label])

    def is_compared(self, codes: np.ndarray) -> np.ndarray:
        """Boolean mask of the compared voxels."""
        return np.isin(codes, self.compared)

    def reduce_to_lesions(self, codes: np.ndarray) -> np.ndarray:
        """0 background, 1 organ, 2 lesion, for surfaces."""
        reduced = (codes > 0).astype(np.uint8)
        if self.has_lesions:
            reduced[self.is_compared(codes)] = 2
        return reduced

    def _codes_of(self, values: object) -> tuple[int, ...]:
        return tuple(sorted({int(self.code_of[value]) for value in values}))  # type: ignore[attr-defined]
