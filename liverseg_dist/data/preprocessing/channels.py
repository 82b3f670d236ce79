"""Several channels of one scan on one grid."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from liverseg_dist.config import ChannelConfig, ConvertConfig, IntensityConfig
from liverseg_dist.data.findings import Finding
from liverseg_dist.data.preprocessing.pipeline import prepare_scan
from liverseg_dist.data.preprocessing.resample import resample_to_grid
from liverseg_dist.volume import Float3, Grid, Volume


@dataclass(frozen=True, eq=False)
class PreparedScan:
    voxels: np.ndarray
    grid: Grid
    present: tuple[bool, ...]
    intensities: tuple[IntensityConfig | None, ...]
    findings: tuple[Finding, ...] = field(default=())


def prepare_channels(
    volumes: Sequence[Volume | None],
    convert: ConvertConfig,
    channels: Sequence[ChannelConfig],
    spacing_mm: Float3,
) -> PreparedScan:
    present = tuple(volume is not None for volume in volumes)
    first = next(volume for volume in volumes if volume is not None)
    prepared = prepare_scan(first, convert, spacing_mm)
    intensities: list[IntensityConfig | None] = []
    voxels = []
    for volume, channel in zip(volumes, channels, strict=True):
        if volume is None:
            voxels.append(np.zeros(prepared.shape, np.int16))
            intensities.append(None)
            continue
        own = (
            prepared
            if volume is first
            else resample_to_grid(prepare_scan(volume, convert, spacing_mm), prepared.grid, "image")
        )
        voxels.append(own.voxels)
        if channel.intensity == "ct":
            intensities.append(None)
            continue
        inside = own.voxels[own.voxels > 0].astype(np.float64)
        intensities.append(
            IntensityConfig(lower_hu=0, upper_hu=float(inside.max()), mean=0.5, std=0.2)
        )
    stacked = voxels[0][None] if len(voxels) == 1 else np.stack(voxels)
    return PreparedScan(stacked, prepared.grid, present, tuple(intensities))
