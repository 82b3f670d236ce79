"""Rows of windows with equal z: read their input, and move their sum to the next row.

Used by `sliding_window`.
"""

import numpy as np
import torch
from torch import Tensor

from liverseg_dist.config import IntensityConfig
from liverseg_dist.data.intensity import normalise_intensity_
from liverseg_dist.inference.windows import WindowGrid


def read_row(
    image_zyx: np.ndarray,
    grid: WindowGrid,
    start: int,
    intensity: IntensityConfig | None,
    pad_value: float,
    device: torch.device,
) -> Tensor:
    """Read the input of one row of windows; it is normalised on the device.

    Args:
        image_zyx: the network's input, or HU if `intensity` is given.
        grid: the windows of the scan.
        start: first slice of the row in the padded scan.
        intensity: how HU are normalised for the network.
        pad_value: value outside the scan, before it is normalised.
        device: where the row is needed.

    Returns:
        float32 tensor (D, H, W), padded to whole windows.
    """
    row_shape = (grid.window[0], *grid.padded_shape[1:])
    first = start - grid.margin[0]
    low, high = max(0, first), min(grid.shape[0], first + row_shape[0])
    slices = np.ascontiguousarray(image_zyx[low:high])
    # Torch cannot share memory that is read-only.
    part = torch.from_numpy(slices if slices.flags.writeable else slices.copy()).to(device)
    # A copy, because the caller's own voxels must not be normalised in place.
    part = part.to(torch.float32, copy=intensity is not None)
    if part.shape != row_shape:
        row = torch.full(row_shape, pad_value, device=device)
        y, x = grid.margin[1:]
        row[low - first : high - first, y : y + grid.shape[1], x : x + grid.shape[2]] = part
        part = row
    if intensity is None:
        return part
    return normalise_intensity_(
        part, intensity.lower_hu, intensity.upper_hu, intensity.mean, intensity.std
    )


def shift_slices(total_FDHW: Tensor, slices: int) -> None:
    """Drop the first slices of a sum, move the others forward and clear the rest, in place.

    The moved pieces do not overlap, so no copy of the sum is needed.
    """
    depth = total_FDHW.shape[1]
    for first in range(0, depth - slices, slices):
        last = min(first + slices, depth - slices)
        total_FDHW[:, first:last] = total_FDHW[:, first + slices : last + slices]
    total_FDHW[:, max(0, depth - slices) :] = 0
