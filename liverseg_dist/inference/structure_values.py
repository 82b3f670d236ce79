"""Which class values a structure consists of, for operations on masks.

A lesion lies inside a container, usually an organ. The tissue of an organ is the organ without its
lesions. Used by `postprocess` and `label_assignment`.
"""

from collections.abc import Collection

import numpy as np

from liverseg_dist.labels import BACKGROUND, LARGEST_VALUE, LITS_SCHEME, LabelScheme, Structure

MAX_COMPARED_VALUES = 3
"""Up to this many values, comparisons are faster than a table."""


def describe_structures(labels: LabelScheme) -> list[tuple[object, ...]]:
    """What decides about masks and results: schemes that differ in codes only are the same."""
    return [(one.name, one.values, one.kind, one.inside) for one in labels.structures]


def is_task03(labels: LabelScheme) -> bool:
    """Whether masks and results are those of Task03, whose keys and names are kept."""
    return describe_structures(labels) == describe_structures(LITS_SCHEME)


def find_container(labels: LabelScheme, structure: Structure) -> Structure | None:
    """The structure that contains this one, or None."""
    return None if structure.inside is None else labels.structure(structure.inside)


def list_tissue_values(labels: LabelScheme, structure: Structure) -> tuple[int, ...]:
    """The values of a structure without those of the lesions in it."""
    own = set(structure.values)
    tissue = set(own)
    for lesion in labels.lesions:
        # Only lesions strictly inside: a lesion with the same values is the structure itself.
        if set(lesion.values) < own:
            tissue -= set(lesion.values)
    return tuple(sorted(tissue))


def find_own_value(labels: LabelScheme, structure: Structure) -> int | None:
    """The value that no structure within this one has; None if it consists of others alone."""
    index = labels.structures.index(structure)
    return dict(labels.paint_order).get(index)


def find_value_after_removal(labels: LabelScheme, structure: Structure) -> int:
    """The value of voxels that are removed from a structure: its container, or background."""
    container = find_container(labels, structure)
    value = None if container is None else find_own_value(labels, container)
    return BACKGROUND if value is None else value


def select_values(mask: np.ndarray, values: Collection[int]) -> np.ndarray:
    """Boolean mask of the voxels that have one of the values."""
    # A table costs one read per voxel for any number of values.
    if len(values) > MAX_COMPARED_VALUES:
        table = np.zeros(LARGEST_VALUE + 1, dtype=bool)
        table[list(values)] = True
        return np.asarray(table[mask])
    selected = np.zeros(mask.shape, dtype=bool)
    for value in values:
        selected |= mask == value
    return selected
