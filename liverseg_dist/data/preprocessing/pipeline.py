"""From a scan to the voxels a network receives; conversion and inference call the same functions.

    clean_scan      all steps of CLEANING_STEPS, at the scan's own voxel size
    prepare_scan    the same, then resampled to `spacing_mm`

Each step gets the channel: HU have rules of their own (air, padding, soft tissue), other modalities
have arbitrary units. Scans of several channels are prepared by `scan_channels`, which calls
`clean_scan` for each.

To add a cleaning step, write a function `(Volume, CleaningConfig, ChannelConfig) -> (Volume,
provenance)` in a module of its own and add one line to CLEANING_STEPS; its settings belong to
`CleaningConfig`. Noise
filters have a registry of their own (`denoise.NOISE_METHODS`).

Clipping and normalisation are not cleaning steps: they are one affine map recorded in the store and
applied on the device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from liverseg_dist.config import CT_CHANNEL, ChannelConfig, CleaningConfig, ConvertConfig
from liverseg_dist.data.preprocessing.body_mask import find_tissue_threshold, remove_surroundings
from liverseg_dist.data.preprocessing.denoise import reduce_noise
from liverseg_dist.data.preprocessing.invalid_voxels import (
    INT16,
    Scale,
    outside_value,
    store_voxels,
)
from liverseg_dist.data.preprocessing.resample import Interpolation, resample_to_grid
from liverseg_dist.volume import CANONICAL_ORIENTATION, Float3, Grid, Volume

Provenance = dict[str, object]
"""What a step did, as JSON. The keys of all steps are stored together as `cleaning` of a case."""
CleaningStep = Callable[[Volume, CleaningConfig, ChannelConfig], tuple[Volume, Provenance]]


@dataclass(frozen=True)
class CleanScan:
    """Int16 voxels in RAS at the scan's own spacing, and what each step did.

    CT is in HU; `scale` gives the scan's own units of other channels.
    """

    volume: Volume
    provenance: Provenance

    @property
    def scale(self) -> Scale:
        recorded = self.provenance.get("scale")
        return Scale(**recorded) if isinstance(recorded, dict) else Scale()


def reorient_step(
    volume: Volume, cleaning: CleaningConfig, channel: ChannelConfig
) -> tuple[Volume, Provenance]:
    """Turn the scan to RAS; the result is a view."""
    return volume.reoriented(CANONICAL_ORIENTATION), {"orientation": volume.grid.orientation}


def invalid_voxels_step(
    volume: Volume, cleaning: CleaningConfig, channel: ChannelConfig
) -> tuple[Volume, Provenance]:
    """Replace voxels without a measurement and convert to int16."""
    voxels, invalid, scale = store_voxels(volume.voxels, channel)
    provenance: Provenance = {"broken": invalid.to_json()}
    if not scale.is_identity:
        provenance["scale"] = scale.to_json()
    return volume.with_voxels(voxels), provenance


def noise_step(
    volume: Volume, cleaning: CleaningConfig, channel: ChannelConfig
) -> tuple[Volume, Provenance]:
    """Reduce noise slice by slice."""
    # Without a filter the threshold is not needed, and finding it costs a pass over the scan.
    tissue = None
    if not channel.is_ct and cleaning.noise != "none":
        tissue = (find_tissue_threshold(volume, channel), float(INT16.max))
    voxels, provenance = reduce_noise(volume.voxels, cleaning, tissue)
    return volume.with_voxels(voxels), {"noise": provenance}


CLEANING_STEPS: dict[str, CleaningStep] = {
    "orientation": reorient_step,
    "invalid_voxels": invalid_voxels_step,
    "noise": noise_step,
    "surroundings": remove_surroundings,
}
"""All steps in the order in which they run; later steps rely on RAS orientation and int16."""


def clean_scan(
    volume: Volume, cleaning: CleaningConfig, channel: ChannelConfig = CT_CHANNEL
) -> CleanScan:
    """Apply all cleaning steps; a step that is switched off in the settings changes nothing.

    Args:
        volume: HU for CT, else arbitrary units, in any orientation and data type.
        cleaning: Settings of the steps.
        channel: The channel of the scan.

    Returns:
        The clean scan. It may be a view of the input, which is never modified.

    Raises:
        UserError: A setting has a value that no step implements.
    """
    provenance: Provenance = {}
    # Each step gets the result of the one before, and adds what it did to one record.
    for step in CLEANING_STEPS.values():
        volume, step_provenance = step(volume, cleaning, channel)
        provenance.update(step_provenance)
    return CleanScan(volume, provenance)


def prepare_scan(
    volume: Volume,
    convert: ConvertConfig,
    spacing_mm: Float3,
    channel: ChannelConfig = CT_CHANNEL,
) -> Volume:
    """Clean a scan and resample it.

    The outer faces of the result coincide with those of the (cropped) scan. Therefore the voxel
    size deviates from `spacing_mm` by at most half a voxel over the whole length.

    Args:
        volume: HU for CT, else arbitrary units, in any orientation and spacing.
        convert: Settings of the conversion.
        spacing_mm: Voxel size (z, y, x) of the result.
        channel: The channel of the scan.

    Returns:
        Int16 voxels in RAS orientation; HU for CT.
    """
    # Cleaned at the scan's own voxel size: noise and the body are properties of the measurement.
    clean = clean_scan(volume, convert.cleaning, channel).volume
    return resample_channel(clean, clean.grid.with_spacing(spacing_mm), convert.cleaning, channel)


def resample_channel(
    clean: Volume, grid: Grid, cleaning: CleaningConfig, channel: ChannelConfig = CT_CHANNEL
) -> Volume:
    """Resample a clean scan as the settings ask for; outside it is air (CT) or 0."""
    return resample_to_grid(
        clean,
        grid,
        "image",
        interpolation=interpolation_for(cleaning),
        fill=outside_value(channel),
    )


def interpolation_for(cleaning: CleaningConfig) -> Interpolation:
    """How the settings ask for images to be interpolated."""
    return Interpolation(cleaning.order, cleaning.order_z, cleaning.antialias)


def make_contiguous(volume: Volume) -> Volume:
    """The same volume with C-contiguous voxels."""
    return volume.with_voxels(np.ascontiguousarray(volume.voxels))
