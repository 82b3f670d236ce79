"""`LabelMapping`: from the label values of one source to the class values of a store.

`label_plan` makes one for each source of a conversion; workers apply it while they read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from liverseg_dist.errors import printable
from liverseg_dist.labels import BACKGROUND, LARGEST_VALUE, LITS_SCHEME, LabelScheme

UNKNOWN = -1
"""In a table: a source value outside the scheme."""


@dataclass(frozen=True)
class LabelMapping:
    """How the label values of one source become the class values of the store.

    Attributes:
        scheme: Of the store.
        class_of: (source value, class value) of each known value; IGNORE for the ignore label.
        annotated: Names of the structures that the source annotates.
        expected: The known values, for messages.
        drops_other_values: Unknown values become background; else they are refused.
    """

    scheme: LabelScheme
    class_of: tuple[tuple[int, int], ...]
    annotated: tuple[str, ...]
    expected: str = ""
    drops_other_values: bool = False
    sources_of: tuple[tuple[str, tuple[str, ...]], ...] = field(default=())
    """(structure, names of the source's labels that it is made of)."""
    class_of_file: tuple[tuple[str, int], ...] = ()
    """(structure, class value) where each structure of the source has a file of its own."""

    @property
    def is_identity(self) -> bool:
        """Whether the source's values are the class values already."""
        return all(value == number for value, number in self.class_of)

    @property
    def is_lits(self) -> bool:
        """Whether this is the mapping of a data set with the values of LiTS."""
        return self.scheme == LITS_SCHEME and self.class_of == LITS_MAPPING.class_of

    @cached_property
    def table(self) -> np.ndarray:
        """Class value by source value, UNKNOWN for values outside the scheme; int16."""
        other = BACKGROUND if self.drops_other_values else UNKNOWN
        table = np.full(LARGEST_VALUE + 1, other, dtype=np.int16)
        for value, number in self.class_of:
            table[value] = number
        return table

    def to_json(self) -> dict[str, Any]:
        """All that the stored labels depend on."""
        return {
            "scheme": self.scheme.to_json(),
            "class_of": [list(pair) for pair in self.class_of],
            "class_of_file": [list(pair) for pair in self.class_of_file],
            "drops_other_values": self.drops_other_values,
        }

    def knows(self, value: int) -> bool:
        """Whether a value may occur in the label files of the source."""
        if self.drops_other_values:
            return True
        return 0 <= value <= LARGEST_VALUE and bool(self.table[value] != UNKNOWN)

    def to_classes(self, label_zyx: np.ndarray) -> np.ndarray:
        """The label in class values, uint8. All of its values must be known."""
        if self.is_identity and not self.drops_other_values:
            return label_zyx.astype(np.uint8, copy=False)
        if self.drops_other_values and label_zyx.dtype != np.uint8:
            is_outside = (label_zyx < 0) | (label_zyx > LARGEST_VALUE)
            label_zyx = np.where(is_outside, BACKGROUND, label_zyx)
        # By slice: an index array of a whole scan would need 8 bytes for each voxel.
        table = self.table.astype(np.uint8)
        result = np.empty(label_zyx.shape, dtype=np.uint8)
        for mapped, slice_yx in zip(result, label_zyx, strict=True):
            mapped[...] = table[slice_yx.astype(np.uint8)]
        return result

    def find_annotated(self, source_names: Sequence[str]) -> tuple[str, ...]:
        """Structures all of whose labels in the source are among the annotated ones."""
        names = set(source_names)
        origins = dict(self.sources_of)
        found = []
        for name in self.annotated:
            if set(origins.get(name, (name,))) <= names:
                found.append(name)
        return tuple(found)


def identity_mapping(scheme: LabelScheme) -> LabelMapping:
    """The mapping of labels that are in class values already."""
    class_of = [(value, value) for value in range(scheme.num_classes)]
    return LabelMapping(scheme, tuple(class_of), scheme.structure_names, describe_classes(scheme))


def describe_classes(scheme: LabelScheme) -> str:
    """`0 background, 1 liver, 2 tumour`."""
    return ", ".join(f"{value} {printable(name)}" for value, name in enumerate(scheme.class_names))


LITS_MAPPING = identity_mapping(LITS_SCHEME)
