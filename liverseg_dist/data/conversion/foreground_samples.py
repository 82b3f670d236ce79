"""Positions of liver and tumour voxels, stored with each case.

The loader centres oversampled patches on these positions, so it need not read a label to find one.
"""

import cc3d
import numpy as np

from liverseg_dist.labels import LIVER, TUMOUR

MIN_PER_TUMOUR = 64
"""Voxels kept of each tumour (or all it has), so that small tumours can be selected too."""


def sample_foreground(label_zyx: np.ndarray, max_per_class: int) -> tuple[np.ndarray, int]:
    """Select voxels evenly from the liver and from each tumour.

    Args:
        label_zyx: Label of a slab.
        max_per_class: Approximate maximum of rows for each class.

    Returns:
        Rows (int16, (n, 5)) of class, tumour number, z, y, x; and the number of tumours. Tumours
        are 26-connected components, numbered from 1 in cc3d's order; the liver has number 0.
    """
    components, tumours = cc3d.connected_components(
        np.ascontiguousarray(label_zyx == TUMOUR), connectivity=26, return_N=True
    )
    liver_voxels = np.flatnonzero(label_zyx == LIVER)
    rows = [_sample_rows(LIVER, 0, liver_voxels, label_zyx.shape, max_per_class)]
    tumour_voxels = np.flatnonzero(components)
    tumour_numbers = components.ravel()[tumour_voxels]
    # A stable sort by tumour keeps each tumour's voxels in ascending order.
    sorted_voxels = tumour_voxels[np.argsort(tumour_numbers, kind="stable")]
    # Entry 0 counts the background, which has no tumour number.
    ends = np.cumsum(np.bincount(tumour_numbers, minlength=1)[1:])
    for number, voxels in enumerate(np.split(sorted_voxels, ends[:-1]), start=1):
        proportional = max_per_class * len(voxels) // max(1, len(tumour_voxels))
        max_rows = max(MIN_PER_TUMOUR, proportional)
        rows.append(_sample_rows(TUMOUR, number, voxels, label_zyx.shape, max_rows))
    return np.concatenate(rows).astype(np.int16), int(tumours)


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
