"""What is done to a finished mask: keep the largest liver, drop specks of tumour."""

import math
from typing import Final

import cc3d
import numpy as np

from liverseg_dist.config import InferenceConfig
from liverseg_dist.labels import BACKGROUND, LIVER, TUMOUR

LIVER_CONNECTIVITY: Final = 26
TUMOUR_CONNECTIVITY: Final = 6
"""Faces, as the lesions of LiTS are counted."""


def postprocess(mask_zyx: np.ndarray, voxel_volume_ml: float, config: InferenceConfig) -> None:
    """Apply what `config` asks for, in place. Works in the box that the foreground fills."""
    box = foreground_box(mask_zyx)
    if box is None:
        return
    inner = mask_zyx[box]
    if config.largest_component:
        keep_largest_liver(inner)
    if config.min_tumour_ml > 0:
        drop_small_tumours(inner, math.ceil(config.min_tumour_ml / voxel_volume_ml - 1e-9))


def keep_largest_liver(mask_zyx: np.ndarray) -> None:
    """Keep the largest connected liver with its tumours, in place; of equals, the one met first."""
    components = cc3d.connected_components((mask_zyx > BACKGROUND).view(np.uint8), connectivity=LIVER_CONNECTIVITY)
    voxels = cc3d.statistics(components, no_slice_conversion=True)["voxel_counts"][1:]
    if len(voxels) > 1:
        mask_zyx[components != np.argmax(voxels) + 1] = BACKGROUND


def drop_small_tumours(mask_zyx: np.ndarray, min_voxels: int) -> None:
    """Turn tumours of fewer voxels into liver, in place: the network held the place for liver or tumour."""
    tumour = (mask_zyx == TUMOUR).view(np.uint8)
    kept = cc3d.dust(tumour, threshold=min_voxels, connectivity=TUMOUR_CONNECTIVITY, binary_image=True)
    mask_zyx[(tumour != 0) & (kept == 0)] = LIVER


def foreground_box(mask_zyx: np.ndarray) -> tuple[slice, slice, slice] | None:
    """The smallest box that holds every voxel above 0; None of nothing. One pass, no copy of the mask."""
    in_plane = np.zeros(mask_zyx.shape[1:], dtype=bool)
    slices = []
    for z, slice_yx in enumerate(mask_zyx):
        lit = slice_yx > 0
        if lit.any():
            slices.append(z)
            in_plane |= lit
    if not slices:
        return None
    rows, columns = (np.flatnonzero(in_plane.any(axis=axis)) for axis in (1, 0))
    return (
        slice(slices[0], slices[-1] + 1),
        slice(int(rows[0]), int(rows[-1]) + 1),
        slice(int(columns[0]), int(columns[-1]) + 1),
    )
