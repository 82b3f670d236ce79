"""Bring a label onto its image's grid, or say why that cannot be; and on which side of the body its liver lies."""

from dataclasses import dataclass

import numpy as np

from liverseg_dist.data.findings import Finding
from liverseg_dist.data.preprocessing.resample import resample_nearest
from liverseg_dist.labels import BACKGROUND
from liverseg_dist.volume import CANONICAL_ORIENTATION, Grid, Volume

MAX_CUT_FRACTION = 0.1
"""A resampled label that loses more than this share of its volume gets a warning of its own."""

BODY_HU = -300
SAMPLE_STEP = 4


@dataclass(frozen=True)
class LabelMatch:
    """The label on the image's grid (None: impossible), and what had to be done."""

    label: Volume | None
    findings: tuple[Finding, ...] = ()


def match_label(image: Grid, label: Volume) -> LabelMatch:
    """Same grid: as it is. Same places in another orientation: turned. Header lost or half a voxel off: the image's
    header is believed. Another grid: nearest neighbour. No common place: refused."""
    if label.grid.matches(image):
        return LabelMatch(Volume(label.voxels, image))
    if (
        label.shape == image.shape
        and has_identity_affine(label.grid)
        and not has_identity_affine(image)
    ):
        message = "the label's header lost its geometry (identity affine); its voxels are laid on the image's grid"
        return LabelMatch(
            Volume(label.voxels, image), (Finding("warning", "label_header_lost", message),)
        )
    turned = label.reoriented(image.orientation)
    found = []
    if turned.grid.orientation != label.grid.orientation:
        message = f"label stored as {label.grid.orientation}, image as {image.orientation}, in the same world: turned"
        found.append(Finding("warning", "label_reoriented", message))
    if turned.grid.matches(image):
        return LabelMatch(Volume(np.ascontiguousarray(turned.voxels), image), tuple(found))
    apart_mm = _measure_distance_mm(turned.grid, image)
    if apart_mm is not None and apart_mm <= min(image.spacing_mm) / 2:
        message = f"label and image lie {apart_mm:.2f} mm apart, less than half a voxel; the image's grid is believed"
        found.append(Finding("warning", "label_shifted", message))
        return LabelMatch(Volume(np.ascontiguousarray(turned.voxels), image), tuple(found))
    return _resample_label(image, label)


def measure_liver_offset_mm(image: Volume, label: Volume) -> float | None:
    """How far the labelled liver's centre lies to the patient's right of the body's centre in the same slices (mm,
    by the affine). None: no liver, or no body above -300 HU."""
    image, label = image.reoriented(CANONICAL_ORIENTATION), label.reoriented(CANONICAL_ORIENTATION)
    liver = label.voxels != BACKGROUND
    planes = np.flatnonzero(liver.any(axis=(1, 2)))
    if not len(planes):
        return None
    within = slice(int(planes[0]), int(planes[-1]) + 1)
    body = image.voxels[within, ::SAMPLE_STEP, ::SAMPLE_STEP] > BODY_HU
    if not body.any():
        return None
    apart_zyx = _measure_centre(liver[within]) - _measure_centre(body) * (
        1,
        SAMPLE_STEP,
        SAMPLE_STEP,
    )
    return float(image.grid.affine[0, :3] @ apart_zyx[::-1])


def _measure_centre(mask_zyx: np.ndarray) -> np.ndarray:
    counts = [mask_zyx.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    return np.array([np.average(np.arange(len(count)), weights=count) for count in counts])


def has_identity_affine(grid: Grid) -> bool:
    """Voxels of exactly 1 mm along the world's axes: what writers leave when they have no geometry."""
    return bool(np.abs(np.abs(grid.affine[:3, :3]) - np.eye(3)).max() < 1e-6)


def _measure_distance_mm(one: Grid, other: Grid) -> float | None:
    if one.shape != other.shape:
        return None
    return float(np.linalg.norm(one.corners_mm() - other.corners_mm(), axis=1).max())


def _resample_label(image: Grid, label: Volume) -> LabelMatch:
    before_ml = np.count_nonzero(label.voxels != BACKGROUND) * label.grid.voxel_volume_ml
    result = resample_nearest(label, image)
    after_ml = np.count_nonzero(result.voxels != BACKGROUND) * image.voxel_volume_ml
    grids = f"label grid {_describe_grid(label.grid)}, image grid {_describe_grid(image)}"
    if before_ml > 0 and after_ml == 0:
        return LabelMatch(
            None,
            (
                Finding(
                    "error", "label_no_overlap", f"{grids}: no labelled voxel lies in the image"
                ),
            ),
        )
    message = f"{grids}: resampled to the nearest voxel, {before_ml:.1f} ml before, {after_ml:.1f} ml after"
    found = [Finding("warning", "label_resampled", message)]
    if after_ml < (1 - MAX_CUT_FRACTION) * before_ml:
        lost = 100 * (1 - after_ml / before_ml)
        found.append(
            Finding("warning", "label_cut", f"{lost:.0f} % of the label lies outside the image")
        )
    return LabelMatch(result, tuple(found))


def _describe_grid(grid: Grid) -> str:
    voxels, sizes = (
        " x ".join(map(str, grid.shape)),
        " x ".join(f"{mm:.3g}" for mm in grid.spacing_mm),
    )
    return f"{voxels} of {sizes} mm {grid.orientation}"
