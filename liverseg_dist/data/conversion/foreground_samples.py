"""Positions of foreground voxels of each class, stored with each case.

The loader centres oversampled patches on these positions, so it need not read a label to find one.
"""

import cc3d
import numpy as np

from liverseg_dist.labels import LabelScheme

MIN_PER_LESION = 64
"""Voxels kept of each lesion (or all it has), so that small lesions can be selected too."""


def sample_foreground(
    label_zyx: np.ndarray, labels: LabelScheme, max_per_class: int
) -> tuple[np.ndarray, dict[str, int]]:
    """Select voxels evenly from each class of an organ and from each lesion.

    Args:
        label_zyx: Label of a slab (class values).
        labels: Scheme of the label.
        max_per_class: Approximate maximum of rows for each class.

    Returns:
        Rows (int16, (n, 5)) of class, lesion number, z, y, x, sorted by class and lesion; and the
        number of lesions of each lesion structure. Lesions are 26-connected components, numbered
        from 1 in cc3d's order; voxels of organs have number 0.
    """
    counts: dict[str, int] = {}
    components_of: dict[int, np.ndarray] = {}
    # The smallest structure that contains a class numbers its voxels: it comes last.
    for lesion in sorted(labels.lesions, key=lambda lesion: -len(lesion.values)):
        components, count = cc3d.connected_components(
            np.ascontiguousarray(labels.mask_of(label_zyx, lesion)),
            connectivity=26,
            return_N=True,
        )
        counts[lesion.name] = int(count)
        components_of |= dict.fromkeys(lesion.values, components)
    rows = [np.empty((0, 5), dtype=np.int64)]
    for value in range(1, labels.num_classes):
        voxels = np.flatnonzero(label_zyx == value)
        if value in components_of:
            numbers = components_of[value].ravel()[voxels]
            rows += _sample_lesions(value, voxels, numbers, label_zyx.shape, max_per_class)
        else:
            rows.append(_sample_rows(value, 0, voxels, label_zyx.shape, max_per_class))
    return np.concatenate(rows).astype(np.int16), counts


def _sample_lesions(
    class_value: int,
    voxels: np.ndarray,
    numbers: np.ndarray,
    shape: tuple[int, ...],
    max_per_class: int,
) -> list[np.ndarray]:
    """Rows of each lesion of a class.

    Args:
        class_value: The class.
        voxels: Flat indices of its voxels, ascending.
        numbers: Number of the lesion of each voxel.
        shape: Shape (z, y, x) of the label.
        max_per_class: Approximate maximum of rows.
    """
    # A stable sort by lesion keeps each lesion's voxels in ascending order.
    sorted_voxels = voxels[np.argsort(numbers, kind="stable")]
    # Entry 0 counts the background, which has no lesion number.
    ends = np.cumsum(np.bincount(numbers, minlength=1)[1:])
    rows = []
    for number, part in enumerate(np.split(sorted_voxels, ends[:-1]), start=1):
        proportional = max_per_class * len(part) // max(1, len(voxels))
        max_rows = max(MIN_PER_LESION, proportional)
        rows.append(_sample_rows(class_value, number, part, shape, max_rows))
    return rows


def _sample_rows(
    class_value: int, number: int, voxels: np.ndarray, shape: tuple[int, ...], max_rows: int
) -> np.ndarray:
    """Rows (n, 5) for at most `max_rows` of `voxels` (flat indices in ascending order)."""
    if len(voxels) > max_rows:
        selected = np.linspace(0, len(voxels) - 1, max_rows).round().astype(int)
        voxels = voxels[selected]
    head = np.tile([class_value, number], (len(voxels), 1))
    positions = np.stack(np.unravel_index(voxels, shape), axis=1)
    return np.concatenate([head, positions], axis=1)
