"""The body of the patient in a scan: its mask, its box, and the removal of everything else.

The mask is the largest connected piece of tissue without the table of the scanner. Tissue is above
-300 HU in CT, and above Otsu's threshold where units are arbitrary.
"""

from dataclasses import dataclass

import cc3d
import numpy as np
from scipy import ndimage

from liverseg_dist.config import CT_CHANNEL, ChannelConfig, CleaningConfig
from liverseg_dist.data.preprocessing.invalid_voxels import AIR_HU, outside_value
from liverseg_dist.errors import UserError
from liverseg_dist.volume import Float3, Volume

TISSUE_HU = -300
COARSE_MM = 3.0
"""Approximate voxel size in plane of the mask: exact enough to crop, 20 times less work."""
TABLE_MM = 6.0
"""Bridges thinner than this (table top, clothes, tubes) do not connect to the body."""
OUTSIDE_BODY_VALUES = ("keep", "air")
OTSU_STEP = 4
OTSU_BINS = 256
OTSU_LIMITS = (0.1, 99.9)
"""Percentiles between which Otsu's threshold is searched."""


@dataclass(frozen=True)
class Box:
    """Voxels [start, stop) along y and x."""

    y: tuple[int, int]
    x: tuple[int, int]


def remove_surroundings(
    volume: Volume, cleaning: CleaningConfig, channel: ChannelConfig = CT_CHANNEL
) -> tuple[Volume, dict[str, object]]:
    """Cleaning step: crop to the body (`body_margin_mm`) and set the rest to air (`outside_body`).

    Args:
        volume: Int16 voxels in RAS orientation.
        cleaning: Settings of the conversion.
        channel: The channel of the scan.

    Returns:
        The volume, and share and box of the body; the input itself when both are switched off.

    Raises:
        UserError: `outside_body` has an unknown value.
    """
    if cleaning.outside_body not in OUTSIDE_BODY_VALUES:
        raise UserError(
            f"convert.cleaning.outside_body: unknown value {cleaning.outside_body!r}; "
            f"use one of {', '.join(OUTSIDE_BODY_VALUES)}"
        )
    has_crop = cleaning.body_margin_mm >= 0
    sets_air = cleaning.outside_body == "air"
    # Both switched off is the usual case; finding the body would cost a second per scan for
    # nothing.
    if not has_crop and not sets_air:
        return volume, {}
    mask = find_body(volume, channel)
    provenance: dict[str, object] = {"body_fraction": round(float(mask.mean()), 6)}
    # An empty mask means that nothing looks like tissue: then nothing is erased.
    if sets_air and mask.any():
        volume = volume.with_voxels(fill_outside(volume.voxels, mask, outside_value(channel)))
    if has_crop:
        box = bounding_box(mask, volume.spacing_mm, cleaning.body_margin_mm)
        shape = (volume.shape[0], box.y[1] - box.y[0], box.x[1] - box.x[0])
        volume = volume.cropped((0, box.y[0], box.x[0]), shape)
        provenance["body_box_yx"] = [list(box.y), list(box.x)]
    return volume, provenance


def find_tissue_threshold(volume: Volume, channel: ChannelConfig = CT_CHANNEL) -> float:
    """The value above which voxels are tissue: -300 HU for CT, else Otsu's threshold.

    Otsu's threshold is computed on the square root of the values above their minimum. In plain
    values, the bright fat or fluid of MR would set a threshold above dark organs.
    Source: Otsu 1979, https://doi.org/10.1109/TSMC.1979.4310076.
    """
    if channel.is_ct:
        return TISSUE_HU
    # Every fourth row and column: a threshold needs no more voxels than that.
    sample = volume.voxels[:, ::OTSU_STEP, ::OTSU_STEP].astype(np.float64)
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return 0.0
    # Single bright or dark voxels would stretch the histogram until tissue has a few bins only.
    low, high = np.percentile(sample, OTSU_LIMITS)
    roots = np.sqrt(np.clip(sample, low, high) - low)
    counts, edges = np.histogram(roots, OTSU_BINS)
    centres = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    # Means of both classes for a threshold behind each bin; an empty class has weight 0 below.
    mean_below = sums / np.maximum(below, 1)
    mean_above = (sums[-1] - sums) / np.maximum(above, 1)
    between_classes = below * above * (mean_below - mean_above) ** 2
    return float(low + edges[1 + int(np.argmax(between_classes))] ** 2)


def find_body(volume: Volume, channel: ChannelConfig = CT_CHANNEL) -> np.ndarray:
    """Boolean mask (z, y, x) of the body with organs and bowel gas; all False without tissue.

    On a coarse grid: threshold, opening in plane, largest connected component, holes filled slice
    by slice. The mask is a few mm larger than the body, so that no skin is lost.
    """
    # In plane only: slices are thick already.
    step_y, step_x = (max(1, round(COARSE_MM / mm)) for mm in volume.spacing_mm[1:])
    threshold = find_tissue_threshold(volume, channel)
    coarse = volume.voxels[:, ::step_y, ::step_x] > threshold
    radius = []
    for mm, step in zip(volume.spacing_mm[1:], (step_y, step_x), strict=True):
        radius.append(max(1, round(TABLE_MM / 2 / (mm * step))))
    disc = _make_disc(radius)[None]
    opened = ndimage.binary_opening(coarse, disc)
    # A body smaller than the disc would vanish by the opening.
    # The whole slice set is kept then, because a missing body is worse than a table in it.
    if not opened.any():
        opened = coarse
    components = cc3d.connected_components(opened, connectivity=6)
    sizes = np.bincount(components.reshape(-1))
    if len(sizes) < 2:
        return np.zeros(volume.shape, dtype=bool)
    body = components == 1 + int(np.argmax(sizes[1:]))
    # Slice by slice: the bowel is open at the end of a scan, so its gas is no hole in 3D.
    for slice_yx in body:
        slice_yx[:] = ndimage.binary_fill_holes(slice_yx)
    # The opening has removed the skin; the dilation by the same disc brings it back, and a little
    # more.
    body = ndimage.binary_dilation(body, disc)
    # The last coarse row or column may cover more than the scan; cut it off.
    full = body.repeat(step_y, axis=1).repeat(step_x, axis=2)
    return full[:, : volume.shape[1], : volume.shape[2]]


def bounding_box(mask_zyx: np.ndarray, spacing_mm: Float3, margin_mm: float) -> Box:
    """The mask's box in plane with a margin, within the scan; the whole plane for an empty mask."""
    # One box for all slices, because the slices of a volume have one shape.
    plane = np.asarray(mask_zyx.any(axis=0))
    if not plane.any():
        return Box((0, plane.shape[0]), (0, plane.shape[1]))
    ends = []
    for axis, mm in ((0, spacing_mm[1]), (1, spacing_mm[2])):
        occupied = np.flatnonzero(plane.any(axis=1 - axis))
        margin = int(np.ceil(margin_mm / mm))
        start = max(int(occupied[0]) - margin, 0)
        stop = min(int(occupied[-1]) + 1 + margin, plane.shape[axis])
        ends.append((start, stop))
    return Box(ends[0], ends[1])


def fill_outside(voxels_zyx: np.ndarray, mask_zyx: np.ndarray, value: int = AIR_HU) -> np.ndarray:
    """Int16 voxels with `value` outside the mask: table, blankets and tubes disappear."""
    return np.where(mask_zyx, voxels_zyx, np.int16(value))


def _make_disc(radius: list[int]) -> np.ndarray:
    """Boolean ellipse (y, x) with these radii in voxels."""
    y, x = np.ogrid[-radius[0] : radius[0] + 1, -radius[1] : radius[1] + 1]
    return (y / max(radius[0], 1)) ** 2 + (x / max(radius[1], 1)) ** 2 <= 1
