"""Histograms of the foreground in HU, one for each channel of CT, as a record keeps them.

Several phases of CT have one normalisation each. The JSON of a single channel is that of its
histogram; of several it is `{"channels": [...]}` with null for channels that are normalised by scan.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from liverseg_dist.config import ChannelConfig
from liverseg_dist.data.preprocessing.intensity_statistics import HuHistogram, pool_histograms
from liverseg_dist.data.preprocessing.resample import resample_nearest
from liverseg_dist.data.preprocessing.scan_channels import CleanChannels
from liverseg_dist.volume import Volume


def count_foreground(clean: CleanChannels, foreground: Volume) -> dict[str, Any]:
    """Count the HU of the foreground in each channel of CT.

    Args:
        clean: The channels of a scan.
        foreground: Boolean mask on the grid of the first channel.
    """
    entries: list[dict[str, object] | None] = []
    for channel, scan in zip(clean.channels, clean.scans, strict=True):
        if scan is None or channel.intensity != "ct":
            entries.append(None)
            continue
        mask = foreground.voxels
        if not scan.volume.grid.matches(foreground.grid):
            # The mask is brought to the voxels, so that no HU is interpolated.
            moved = foreground.with_voxels(foreground.voxels.astype(np.uint8))
            mask = resample_nearest(moved, scan.volume.grid).voxels > 0
        entries.append(HuHistogram.from_voxels(scan.volume.voxels[mask]).to_json())
    if len(entries) == 1:
        return entries[0] or {}
    return {"channels": entries}


def pool_channel_histograms(
    histograms: Iterable[Mapping[str, Any]], channels: Sequence[ChannelConfig]
) -> list[HuHistogram]:
    """The histogram of all scans for each channel; empty for a channel without entries."""
    by_channel: list[list[HuHistogram]] = [[] for _ in channels]
    for content in histograms:
        entries = content.get("channels", [content or None])
        for found, entry in zip(by_channel, entries, strict=True):
            if entry is not None:
                found.append(HuHistogram.from_json(entry))
    return [pool_histograms(found) for found in by_channel]
