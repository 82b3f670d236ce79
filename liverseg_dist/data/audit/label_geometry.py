"""Bring a label onto its image's grid, and measure on which side of the body an organ is."""

from dataclasses import dataclass

import numpy as np

from liverseg_dist.config import CT_CHANNEL, ChannelConfig
from liverseg_dist.data.findings import Finding
from liverseg_dist.data.preprocessing.body_mask import find_tissue_threshold
from liverseg_dist.data.preprocessing.resample import resample_nearest
from liverseg_dist.labels import BACKGROUND
from liverseg_dist.volume import CANONICAL_ORIENTATION, Grid, Volume

MAX_CUT_FRACTION = 0.1
"""A resampled label that loses more than this fraction of its volume gets a finding of its own."""
IDENTITY_TOLERANCE = 1e-6

SAMPLE_STEP = 4
"""In plane: the body's centre needs no more voxels."""


@dataclass(frozen=True)
class LabelMatch:
    """The label on the image's grid (None: impossible), and the findings on how it got there."""

    label: Volume | None
    findings: tuple[Finding, ...] = ()


def match_label(image: Grid, label: Volume) -> LabelMatch:
    """Bring a label onto the grid of its image.

    - Same grid: the voxels are used as they are.
    - Same voxel positions in another orientation: axes are permuted and flipped.
    - Identity affine, or a shift of at most half a voxel: the image's grid is used.
    - Another grid: resampled to the nearest voxel; an error if no labelled voxel is in the image.
    """
    if label.grid.matches(image):
        return LabelMatch(Volume(label.voxels, image))
    is_header_lost = has_identity_affine(label.grid) and not has_identity_affine(image)
    # Equal shapes make it likely that only the header differs.
    if label.shape == image.shape and is_header_lost:
        message = (
            "the label's header lost its geometry (identity affine); "
            "its voxels are placed on the image's grid"
        )
        finding = Finding("warning", "label_header_lost", message)
        return LabelMatch(Volume(label.voxels, image), (finding,))
    reoriented = label.reoriented(image.orientation)
    findings = []
    if reoriented.grid.orientation != label.grid.orientation:
        message = (
            f"label stored as {label.grid.orientation}, image as {image.orientation}, "
            "at the same positions: label reoriented"
        )
        findings.append(Finding("warning", "label_reoriented", message))
    is_same_grid = reoriented.grid.matches(image)
    if not is_same_grid:
        distance_mm = _measure_distance_mm(reoriented.grid, image)
        # Up to half a voxel, each label voxel still has its nearest image voxel at the same index.
        if distance_mm is None or distance_mm > min(image.spacing_mm) / 2:
            return _resample_label(image, label)
        message = (
            f"label and image are {distance_mm:.2f} mm apart, less than half a voxel; "
            "the image's grid is used"
        )
        findings.append(Finding("warning", "label_shifted", message))
    voxels = np.ascontiguousarray(reoriented.voxels)
    return LabelMatch(Volume(voxels, image), tuple(findings))


def measure_offset_mm(
    image: Volume, organ: Volume, channel: ChannelConfig = CT_CHANNEL
) -> float | None:
    """Distance of an organ's centre from the body's centre, to the patient's right.

    Both are measured in the slices that hold the organ, by the affine.

    Args:
        image: HU for CT, else arbitrary units; in any orientation.
        organ: Mask of the organ on the image's grid.
        channel: The channel of the image.

    Returns:
        mm, negative if the organ is on the left. None without organ, or without tissue.
    """
    image = image.reoriented(CANONICAL_ORIENTATION)
    mask = organ.reoriented(CANONICAL_ORIENTATION).voxels
    planes = np.flatnonzero(mask.any(axis=(1, 2)))
    if not len(planes):
        return None
    organ_slices = slice(int(planes[0]), int(planes[-1]) + 1)
    threshold = find_tissue_threshold(image, channel)
    body = image.voxels[organ_slices, ::SAMPLE_STEP, ::SAMPLE_STEP] > threshold
    if not body.any():
        return None
    body_centre = _measure_centre(body) * (1, SAMPLE_STEP, SAMPLE_STEP)
    offset_zyx = _measure_centre(mask[organ_slices]) - body_centre
    # The first row of the affine gives the world's x, which points to the right in RAS+.
    return float(image.grid.affine[0, :3] @ offset_zyx[::-1])


def _measure_centre(mask_zyx: np.ndarray) -> np.ndarray:
    """Centre of gravity (z, y, x) in voxels."""
    centre = []
    for axis in range(3):
        other_axes = tuple(other for other in range(3) if other != axis)
        counts = mask_zyx.sum(axis=other_axes)
        centre.append(np.average(np.arange(len(counts)), weights=counts))
    return np.array(centre)


def has_identity_affine(grid: Grid) -> bool:
    """Whether voxels are exactly 1 mm along the world's axes: a sign of lost geometry."""
    # Absolute values: axes of an identity affine may be flipped.
    difference = np.abs(grid.affine[:3, :3]) - np.eye(3)
    return bool(np.abs(difference).max() < IDENTITY_TOLERANCE)


def _measure_distance_mm(grid: Grid, other: Grid) -> float | None:
    """Largest distance between corresponding corner voxels; None for different shapes."""
    if grid.shape != other.shape:
        return None
    return float(np.linalg.norm(grid.corners_mm() - other.corners_mm(), axis=1).max())


def _resample_label(image: Grid, label: Volume) -> LabelMatch:
    before_ml = np.count_nonzero(label.voxels != BACKGROUND) * label.grid.voxel_volume_ml
    result = resample_nearest(label, image)
    after_ml = np.count_nonzero(result.voxels != BACKGROUND) * image.voxel_volume_ml
    grids = f"label grid {_describe_grid(label.grid)}, image grid {_describe_grid(image)}"
    if before_ml > 0 and after_ml == 0:
        message = f"{grids}: no labelled voxel is inside the image"
        return LabelMatch(None, (Finding("error", "label_no_overlap", message),))
    message = (
        f"{grids}: resampled to the nearest voxel, "
        f"{before_ml:.1f} ml before, {after_ml:.1f} ml after"
    )
    findings = [Finding("warning", "label_resampled", message)]
    if after_ml < (1 - MAX_CUT_FRACTION) * before_ml:
        lost_percent = 100 * (1 - after_ml / before_ml)
        message = f"{lost_percent:.0f} % of the label is outside the image"
        findings.append(Finding("warning", "label_cut", message))
    return LabelMatch(result, tuple(findings))


def _describe_grid(grid: Grid) -> str:
    shape = " x ".join(map(str, grid.shape))
    spacing = " x ".join(f"{mm:.3g}" for mm in grid.spacing_mm)
    return f"{shape} of {spacing} mm {grid.orientation}"
