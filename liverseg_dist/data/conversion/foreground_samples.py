"""Positions of liver and tumour voxels, stored so that a patch centred on one costs nothing to place."""

import cc3d
import numpy as np

from liverseg_dist.labels import LIVER, TUMOUR

LEAST_PER_TUMOUR = 64
"""Voxels a tumour keeps however many others there are (or all it has), so that each can be chosen alike."""


def foreground_samples(label_zyx: np.ndarray, most: int) -> tuple[np.ndarray, int]:
    """(int16 (n, 5) of class, tumour number, z, y, x; number of tumours). Evenly spread over each component's voxels.

    About `most` rows per class at the most; tumours are 26-connected components, numbered from 1 as cc3d meets them.
    """
    components, tumours = cc3d.connected_components(
        np.ascontiguousarray(label_zyx == TUMOUR), connectivity=26, return_N=True
    )
    rows = [_rows(LIVER, 0, np.flatnonzero(label_zyx == LIVER), label_zyx.shape, most)]
    places = np.flatnonzero(components)
    owner = components.ravel()[places]
    by_owner = places[np.argsort(owner, kind="stable")]
    for number, voxels in enumerate(
        np.split(by_owner, np.cumsum(np.bincount(owner, minlength=1)[1:])[:-1]), start=1
    ):
        share = max(LEAST_PER_TUMOUR, most * len(voxels) // max(1, len(places)))
        rows.append(_rows(TUMOUR, number, voxels, label_zyx.shape, share))
    return np.concatenate(rows).astype(np.int16), int(tumours)


def _rows(
    value: int, number: int, places: np.ndarray, shape: tuple[int, ...], most: int
) -> np.ndarray:
    """`places`: flat indices in ascending order."""
    if len(places) > most:
        places = places[np.linspace(0, len(places) - 1, most).round().astype(int)]
    head = np.tile([value, number], (len(places), 1))
    return np.concatenate([head, np.stack(np.unravel_index(places, shape), axis=1)], axis=1)
