"""What happens to a scan's voxels before the network sees them; conversion and inference call the same functions.

    clean_scan      broken voxels filled, RAS orientation, noise reduction, body crop        (the scan's own voxel size)
    prepare_scan    the same, then resampled to `spacing_mm`

Clipping and normalisation are not done here: they are one recorded affine, applied on the device.
"""

from dataclasses import dataclass

import numpy as np

from liverseg_dist.config import CleaningConfig, ConvertConfig
from liverseg_dist.data.preprocessing.body_mask import body_box, body_mask, without_surroundings
from liverseg_dist.data.preprocessing.denoise import reduce_noise
from liverseg_dist.data.preprocessing.invalid_voxels import fill_invalid_voxels
from liverseg_dist.data.preprocessing.resample import Interpolation, resample_to_grid
from liverseg_dist.volume import CANONICAL_ORIENTATION, Float3, Volume


@dataclass(frozen=True)
class CleanScan:
    """Int16 HU in RAS at the scan's own spacing, and what each step did."""

    volume: Volume
    provenance: dict[str, object]


def clean_scan(volume: Volume, cleaning: CleaningConfig) -> CleanScan:
    """Every step but resampling. The result may be a view of the input (never a changed one)."""
    canonical = volume.reoriented(CANONICAL_ORIENTATION)
    voxels, broken = fill_invalid_voxels(canonical.voxels)
    voxels, noise = reduce_noise(voxels, cleaning)
    canonical = canonical.with_voxels(voxels)
    provenance: dict[str, object] = {
        "orientation": volume.grid.orientation,
        "broken": broken.to_json(),
        "noise": noise,
    }
    if cleaning.body_margin_mm >= 0 or cleaning.outside_body == "air":
        mask = body_mask(canonical)
        provenance["body_fraction"] = round(float(mask.mean()), 6)
        if cleaning.outside_body == "air" and mask.any():
            canonical = canonical.with_voxels(without_surroundings(canonical.voxels, mask))
        if cleaning.body_margin_mm >= 0:
            box = body_box(mask, canonical.spacing_mm, cleaning.body_margin_mm)
            shape = (canonical.shape[0], box.y[1] - box.y[0], box.x[1] - box.x[0])
            canonical = canonical.cropped((0, box.y[0], box.x[0]), shape)
            provenance["body_box_yx"] = [list(box.y), list(box.x)]
    return CleanScan(canonical, provenance)


def prepare_scan(volume: Volume, convert: ConvertConfig, spacing_mm: Float3) -> Volume:
    """A scan in HU, in any orientation and spacing -> int16 HU in RAS with voxels of `spacing_mm` (z, y, x).

    Outer faces coincide with the (cropped) scan's, so the spacing is met to within half a voxel over the whole length.
    """
    clean = clean_scan(volume, convert.cleaning).volume
    return resample_to_grid(
        clean,
        clean.grid.with_spacing(spacing_mm),
        "image",
        interpolation=interpolation_for(convert.cleaning),
    )


def interpolation_for(cleaning: CleaningConfig) -> Interpolation:
    return Interpolation(cleaning.order, cleaning.order_z, cleaning.antialias)


def make_contiguous(volume: Volume) -> Volume:
    """The same volume with C-contiguous voxels."""
    return volume.with_voxels(np.ascontiguousarray(volume.voxels))
