"""Rows of windows with equal z: read their input, and move their sum to the next row.

Used by `sliding_window`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from liverseg_dist.config import IntensityConfig
from liverseg_dist.config.registry import find_registered
from liverseg_dist.data.intensity import normalise_intensity_
from liverseg_dist.inference.windows import WindowGrid
from liverseg_dist.volume import Index3

Intensities = IntensityConfig | Sequence[IntensityConfig | None] | None
"""Normalisation of each channel, or of the only one; None: the voxels are the network's input."""


def _find_lowest(intensity: IntensityConfig) -> float:
    # The lower limit, which the clipping of the normalisation does not change.
    return intensity.lower_hu


def _find_mean(intensity: IntensityConfig) -> float:
    return intensity.lower_hu + intensity.mean * (intensity.upper_hu - intensity.lower_hu)


PADDINGS = {"lowest": _find_lowest, "mean": _find_mean}
"""Value before normalisation, by the name of `inference.padding`."""


@dataclass(frozen=True)
class ImageChannels:
    """A scan's channels and their normalisation.

    Attributes:
        voxels_CZYX: the voxels; those of an absent channel are not read.
        intensities: normalisation of each channel; None: the voxels are the network's input.
        present: whether the scan has the channel.
        pad_values: value outside the scan of each channel, before it is normalised.
    """

    voxels_CZYX: np.ndarray
    intensities: tuple[IntensityConfig | None, ...]
    present: tuple[bool, ...]
    pad_values: tuple[float, ...]

    @classmethod
    def from_array(
        cls,
        image: np.ndarray,
        intensities: Intensities,
        present: Sequence[bool] | None,
        padding: str = "lowest",
    ) -> "ImageChannels":
        """The channels of an array (C, z, y, x), or (z, y, x) for one channel.

        Args:
            image: the voxels.
            intensities: normalisation of each channel.
            present: which channels the scan has; None: all.
            padding: a name of `PADDINGS`; without effect on channels without normalisation.

        Raises:
            ValueError: another number of channels than of normalisations or of `present`.
            UserError: unknown padding.
        """
        pad_value = find_registered(PADDINGS, padding, "inference.padding")
        voxels_CZYX = image[None] if image.ndim == 3 else image
        count = len(voxels_CZYX)
        if intensities is None:
            intensities = (None,) * count
        elif isinstance(intensities, IntensityConfig):
            intensities = (intensities,)
        has_channel = (True,) * count if present is None else tuple(present)
        if len(intensities) != count or len(has_channel) != count:
            raise ValueError(
                f"{count} channels, {len(intensities)} normalisations, {len(has_channel)} entries "
                "of present"
            )
        pad_values = []
        for voxels_ZYX, intensity, is_present in zip(
            voxels_CZYX, intensities, has_channel, strict=True
        ):
            if not is_present:
                # The voxels of an absent channel may be undefined: their minimum is not read.
                pad_values.append(0.0)
            elif intensity is None:
                # As in training, where padding without a normalisation takes the lowest value of
                # the image.
                pad_values.append(float(voxels_ZYX.min()))
            else:
                pad_values.append(pad_value(intensity))
        return cls(voxels_CZYX, tuple(intensities), has_channel, tuple(pad_values))

    @property
    def shape(self) -> Index3:
        """Shape (z, y, x)."""
        _, z, y, x = self.voxels_CZYX.shape
        return z, y, x


def read_row(channels: ImageChannels, grid: WindowGrid, start: int, device: torch.device) -> Tensor:
    """Read the input of one row of windows; it is normalised on the device.

    Args:
        channels: the scan.
        grid: the windows of the scan.
        start: first slice of the row in the padded scan.
        device: where the row is needed.

    Returns:
        float32 tensor (C, D, H, W), padded to whole windows; 0 for an absent channel.
    """
    count = len(channels.present)
    if count == 1:
        # One channel needs no copy.
        return _read_channel(channels, 0, grid, start, device)[None]
    row_CDHW = torch.empty((count, grid.window[0], *grid.padded_shape[1:]), device=device)
    for number in range(count):
        row_CDHW[number] = _read_channel(channels, number, grid, start, device)
    return row_CDHW


def _read_channel(
    channels: ImageChannels, number: int, grid: WindowGrid, start: int, device: torch.device
) -> Tensor:
    row_shape = (grid.window[0], *grid.padded_shape[1:])
    if not channels.present[number]:
        # Zero is the mean of a normalised channel: what the network saw for absent channels in
        # training.
        return torch.zeros(row_shape, device=device)
    intensity = channels.intensities[number]
    first = start - grid.margin[0]
    low, high = max(0, first), min(grid.shape[0], first + row_shape[0])
    slices = np.ascontiguousarray(channels.voxels_CZYX[number, low:high])
    # Torch cannot share memory that is read-only.
    part = torch.from_numpy(slices if slices.flags.writeable else slices.copy()).to(device)
    # A copy, because the caller's own voxels must not be normalised in place.
    part = part.to(torch.float32, copy=intensity is not None)
    if part.shape != row_shape:
        # Padded before the normalisation, so the padding gets the same scale as the voxels.
        row = torch.full(row_shape, channels.pad_values[number], device=device)
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
    # Pieces as long as the shift, so that source and destination of one copy never overlap.
    for first in range(0, depth - slices, slices):
        last = min(first + slices, depth - slices)
        total_FDHW[:, first:last] = total_FDHW[:, first + slices : last + slices]
    total_FDHW[:, max(0, depth - slices) :] = 0
