"""Normalisation of a single scan, for channels without HU: `scan_intensity(volume, channel)`.

A CT is normalised by the HU of the data set (`intensity_statistics`). Other modalities have
arbitrary units that differ from scan to scan, so each scan has numbers of its own. Conversion stores
them with the case, inference computes them for a new scan; both call this function on the cleaned
scan before it is resampled, so that the numbers depend on neither slab nor voxel size.
"""

import numpy as np

from liverseg_dist.config import ChannelConfig, IntensityConfig
from liverseg_dist.data.preprocessing.body_mask import find_body
from liverseg_dist.data.preprocessing.intensity_statistics import MIN_STD, HuHistogram
from liverseg_dist.data.preprocessing.invalid_voxels import Scale
from liverseg_dist.volume import Volume

PERCENTILES = (0.5, 99.5)
MIN_WIDTH = 1.0
"""In stored units: a constant scan must not lead to a division by zero."""


def scan_intensity(
    volume: Volume, channel: ChannelConfig, scale: Scale | None = None
) -> IntensityConfig | None:
    """The normalisation of one channel of one scan, in stored units.

    - `zscore`: clip to the 0.5 and 99.5 percentiles of the body, then zero mean and unit variance
      within the body.
    - `percentiles`: the same range becomes 0 to 1.
    - `range`: `channel.lower` to `channel.upper` become 0 to 1.
    - `ct`: None, because the numbers are those of the data set.

    Args:
        volume: Int16 voxels, cleaned, in RAS orientation (`pipeline.clean_scan`).
        channel: The channel of the scan.
        scale: Units of the stored values, for `range`; None: the scan's own units.
    """
    if channel.intensity == "ct":
        return None
    if channel.intensity == "range":
        # `ChannelConfig` refuses a range without limits.
        assert channel.lower is not None
        assert channel.upper is not None
        units = scale or Scale()
        lower, upper = units.to_stored(channel.lower), units.to_stored(channel.upper)
        return IntensityConfig(lower_hu=lower, upper_hu=upper, mean=0.0, std=1.0)
    histogram = HuHistogram.from_voxels(_body_voxels(volume, channel))
    lower, upper = (histogram.quantile(percent) for percent in PERCENTILES)
    upper = max(upper, lower + MIN_WIDTH)
    if channel.intensity == "percentiles":
        return IntensityConfig(lower_hu=lower, upper_hu=upper, mean=0.0, std=1.0)
    mean, std = histogram.moments(lower, upper)
    width = upper - lower
    return IntensityConfig(
        lower_hu=lower,
        upper_hu=upper,
        mean=(mean - lower) / width,
        std=max(std / width, MIN_STD),
    )


def _body_voxels(volume: Volume, channel: ChannelConfig) -> np.ndarray:
    """Voxels of the body; all voxels if nothing looks like a body."""
    body = find_body(volume, channel)
    return volume.voxels[body] if body.any() else volume.voxels
