"""The part of the audit that needs no label: is this a CT in HU, whole, and of a believable size?

`audit_case` (conversion) and `inference.scan_checks` (predict, evaluate) call the same functions, so a
scan that conversion excludes is refused by inference for the same reason.
"""

from collections.abc import Sequence

import numpy as np

from liverseg_dist.config import CleaningConfig
from liverseg_dist.data.audit.label_geometry import has_identity_affine
from liverseg_dist.data.findings import Finding, Severity
from liverseg_dist.data.preprocessing.invalid_voxels import (
    AIR_HU,
    InvalidVoxels,
    fill_invalid_voxels,
    invalid_fraction,
)
from liverseg_dist.labels import LIVER
from liverseg_dist.volume import CANONICAL_ORIENTATION, Volume

SLAB_SLICES = 64
VERY_FEW_SLICES = 8
LIVER_HU = (-100.0, 300.0)
"""Median HU of a liver: fat to haemochromatosis and contrast, with room."""
OFFSET_LIVER_HU = (850.0, 1400.0)
"""The same when 1024 was never subtracted."""
NO_AIR_HU = -200.0
"""A CT whose lowest value is above this shows no air: a crop, a window of grey values, or no CT."""
BODY_HU = -300.0
SAMPLE_STEP = 4
MAX_MINOR_PADDING_FRACTION = 1e-3
MIN_FLOOR_HU = -10.0
"""A window of HU that starts below this is none of grey values (nnU-Net's clip for LiTS starts at -17)."""
FLOOR_BAND_FRACTION = 0.03
"""Part of the value range that counts as the lowest values."""
MIN_BACKGROUND_FRACTION = 0.05
"""Of voxels: with more in the lowest band, the image has a background."""
VOXEL_LIMITS_MM = (0.15, 20.0)
"""Voxel edges of CTs, with room: a header in cm gives 0.05 to 0.1."""
EXTENT_LIMITS_MM = (60.0, 1000.0)
"""Field of view of CTs in plane, with room; a header in cm gives about 40."""
MAX_LENGTH_MM = 2500.0


def audit_image(
    image: Volume,
    cleaning: CleaningConfig,
    notes: Sequence[Finding] = (),
    label: Volume | None = None,
) -> tuple[list[Finding], dict[str, object]]:
    """Findings and facts of a scan by itself.

    Args:
        image: HU, in any orientation.
        notes: findings of the reader.
        label: labels on the image's grid, where they are known: the liver's HU are then measured
            and not estimated.

    Returns:
        Findings, the reader's first, and JSON-able facts.
    """
    facts = collect_image_facts(image)
    findings = [*notes, *check_grid(image, cleaning), *check_invalid_voxels(image, cleaning, facts)]
    return [*findings, *check_intensity(image, label, facts)], facts


def collect_image_facts(image: Volume) -> dict[str, object]:
    """Size and orientation, for the record."""
    return {
        "shape_zyx": list(image.shape),
        "spacing_mm": [round(mm, 6) for mm in image.spacing_mm],
        "orientation": image.grid.orientation,
    }


# --- geometry ---------------------------------------------------------------------------------------------------------


def check_grid(image: Volume, cleaning: CleaningConfig) -> list[Finding]:
    """Lost or unbelievable voxel sizes, too few slices, a tilt."""
    found = []
    if has_identity_affine(image.grid):
        message = (
            "identity affine with voxels of 1 mm: the header lost its geometry (known for LiTS 28 to 47); "
            "give the true sizes in convert.cleaning.spacing_table"
        )
        found.append(Finding("warning", "identity_affine", message))
    else:
        found += _check_sizes(image)
    found += _check_slices(image, cleaning)
    tilt = _measure_tilt_degrees(image)
    if tilt > 1:
        found.append(
            Finding(
                "info",
                "oblique",
                f"axes are {tilt:.1f} degrees off the world's; the grid is kept as it is",
            )
        )
    return found


def _check_sizes(image: Volume) -> list[Finding]:
    canonical = image.reoriented(CANONICAL_ORIENTATION)
    spacing = canonical.spacing_mm
    extent = [n * mm for n, mm in zip(canonical.shape, spacing, strict=True)]
    low, high = VOXEL_LIMITS_MM
    narrow, wide = EXTENT_LIMITS_MM
    bad_voxel = min(spacing) < low or max(spacing) > high
    bad_extent = min(extent[1:]) < narrow or max(extent[1:]) > wide or extent[0] > MAX_LENGTH_MM
    if not (bad_voxel or bad_extent):
        return []
    voxels = " x ".join(f"{mm:.3g}" for mm in spacing)
    fields = " x ".join(f"{mm:.0f}" for mm in extent)
    message = f"voxels of {voxels} mm, a field of view of {fields} mm (z, y, x): not a CT's; is the header in mm?"
    return [Finding("warning", "implausible_voxel_size", message)]


def _check_slices(image: Volume, cleaning: CleaningConfig) -> list[Finding]:
    canonical = image.reoriented(CANONICAL_ORIENTATION)
    slices = canonical.shape[0]
    # Resampling may leave fewer slices than the file has: 3 slices of 1 mm are one of 3 mm.
    wanted = cleaning.spacing_mm[0] if cleaning.spacing_mm is not None else canonical.spacing_mm[0]
    filled = min(slices, max(1, round(slices * canonical.spacing_mm[0] / wanted)))
    if filled < cleaning.min_slices:
        message = (
            f"{slices} slices fill {filled} of the {SLAB_SLICES} slices of a slab, all others are padding; at least "
            f"{cleaning.min_slices} (convert.cleaning.min_slices)"
        )
        return [Finding("error", "very_few_slices", message)]
    message = f"{slices} slices, fewer than the {SLAB_SLICES} of a slab"
    if slices < VERY_FEW_SLICES:
        return [Finding("warning", "very_few_slices", message)]
    return [Finding("info", "few_slices", message)] if slices < SLAB_SLICES else []


def _measure_tilt_degrees(image: Volume) -> float:
    directions = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
    return float(np.degrees(np.arccos(np.clip(np.abs(directions).max(axis=0).min(), -1, 1))))


# --- voxels without a measurement -------------------------------------------------------------------------------------


def check_invalid_voxels(
    image: Volume, cleaning: CleaningConfig, facts: dict[str, object]
) -> list[Finding]:
    """NaN, padding and blank slices; too many of them are an error."""
    canonical = image.reoriented(CANONICAL_ORIENTATION)
    _, broken = fill_invalid_voxels(canonical.voxels)
    facts["broken"] = broken.to_json()
    found = _report_invalid_voxels(broken, int(np.prod(canonical.shape)))
    share = invalid_fraction(broken, canonical.shape)
    if share > cleaning.max_broken_fraction:
        limit = cleaning.max_broken_fraction
        message = f"{100 * share:.1f} % broken voxels; at most {100 * limit:.1f} % (convert.cleaning.max_broken_fraction)"
        found.append(Finding("error", "too_many_broken_voxels", message))
    return found


def _report_invalid_voxels(broken: InvalidVoxels, voxels: int) -> list[Finding]:
    found = []
    if broken.nonfinite_voxels:
        message = f"{broken.nonfinite_voxels:,} NaN or infinite voxels become air ({AIR_HU} HU)"
        found.append(Finding("warning", "broken_voxels", message))
    if broken.padding_voxels:
        message = f"{broken.padding_voxels:,} voxels below {AIR_HU} HU (padding, or noise in air) become air"
        severity: Severity = (
            "warning" if broken.padding_voxels > MAX_MINOR_PADDING_FRACTION * voxels else "info"
        )
        found.append(Finding(severity, "padding_values", message))
    if broken.blank_slices:
        some = ", ".join(map(str, broken.blank_slices[:8]))
        message = (
            f"{len(broken.blank_slices)} blank slice(s) within the scan are interpolated: {some}"
        )
        found.append(Finding("warning", "blank_slices", message))
    return found


# --- intensity --------------------------------------------------------------------------------------------------------


def check_intensity(image: Volume, label: Volume | None, facts: dict[str, object]) -> list[Finding]:
    """Whether the values are HU of a CT. A label gives the liver's median, else tissue is estimated."""
    sample = sample_voxels(image)
    if not sample.size:
        return []
    low, high = float(np.nanmin(image.voxels)), float(np.nanmax(image.voxels))
    facts["hu_range"] = [low, high]
    facts["hu_percentiles"] = {
        str(p): round(float(np.percentile(sample, p)), 1) for p in (1, 25, 50, 75, 99)
    }
    if low == high:
        return [
            Finding("error", "constant_image", f"every voxel is {low:g}; there is no scan in it")
        ]
    median = None
    if label is not None:
        values = image.voxels[(label.voxels == LIVER)]
        median = float(np.median(values)) if values.size else None
        facts["liver_median_hu"] = median
    return _judge_intensity(low, high, sample, median)


def sample_voxels(image: Volume) -> np.ndarray:
    """Finite values of at most 64 slices, every fourth voxel in plane; float32."""
    sample = image.voxels[:: 1 + image.shape[0] // 64, ::SAMPLE_STEP, ::SAMPLE_STEP].astype(
        np.float32
    )
    return sample[np.isfinite(sample)]


def _judge_intensity(
    low: float, high: float, sample: np.ndarray, liver_median: float | None
) -> list[Finding]:
    """A CT in HU has air far below zero; what has none is another modality, or was shifted or scaled."""
    # Not the minimum: resampling (cubic, sinc) leaves a few negative voxels beside bright ones in MR as well.
    if np.percentile(sample, 0.1) > NO_AIR_HU:
        tissue = (
            liver_median
            if liver_median is not None
            else float(np.median(sample[sample > sample.mean()]))
        )
        if _is_offset_tissue_hu(tissue):
            return [_report_missing_offset(low, high, tissue)]
        if not _is_tissue_hu(tissue) or high - low < 100 or _has_background(low, high, sample):
            return [_report_not_ct(low, high, tissue)]
    elif liver_median is None or not _is_tissue_hu(liver_median):
        # Low values alone prove nothing: padding of -2000 beside values without offset, or a factor.
        bright = _estimate_tissue_hu(sample)
        if bright is not None and bright > LIVER_HU[1]:
            return [
                _report_missing_offset(low, high, bright)
                if _is_offset_tissue_hu(bright)
                else _report_not_ct(low, high, bright)
            ]
    if liver_median is not None and not _is_tissue_hu(liver_median):
        message = (
            f"the liver's median is {liver_median:.0f} HU; does the label belong to this image?"
        )
        return [Finding("warning", "liver_hu_implausible", message)]
    return []


def _estimate_tissue_hu(sample: np.ndarray) -> float | None:
    """Median of the brighter part of the body; None where nearly nothing is denser than air."""
    body = sample[sample > BODY_HU]
    if body.size < max(1.0, 0.01 * sample.size):
        return None
    bright = body[body > body.mean()]
    return float(np.median(bright)) if bright.size else None


def _has_background(low: float, high: float, sample: np.ndarray) -> bool:
    """Whether the lowest values, about 0 or above, are those of a background.

    Air is -1000 HU, so an image with a background at 0 is no CT in HU: grey values of 8 bits, MR. A crop
    from inside the body has no background, and its lowest values are rare.
    """
    floor, top = np.percentile(sample, (1, 99))
    if floor < MIN_FLOOR_HU and (low, high) != (
        -128.0,
        127.0,
    ):  # the second: grey values of 8 bits with a sign
        return False
    return (
        float(np.mean(sample <= floor + FLOOR_BAND_FRACTION * (top - floor)))
        >= MIN_BACKGROUND_FRACTION
    )


def _is_tissue_hu(hu: float) -> bool:
    return LIVER_HU[0] <= hu <= LIVER_HU[1]


def _is_offset_tissue_hu(hu: float) -> bool:
    return OFFSET_LIVER_HU[0] <= hu <= OFFSET_LIVER_HU[1]


def _report_missing_offset(low: float, high: float, tissue: float) -> Finding:
    message = f"values {low:g} to {high:g}, tissue near {tissue:.0f}: 1024 was not subtracted; correct scl_inter"
    return Finding("error", "hu_offset_missing", message)


def _report_not_ct(low: float, high: float, tissue: float) -> Finding:
    message = f"values from {low:g} to {high:g}, tissue near {tissue:.4g}: not HU of a CT (MR, or rescaled?)"
    return Finding("error", "not_ct_like", message)
