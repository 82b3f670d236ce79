"""The part of the audit that needs no label: is the scan complete and of plausible size, and are its
values those of its channel?

A CT must be in HU. Other channels have arbitrary units: they are refused only where the file holds
no scan at all, and a CT that was declared as one of them gets a warning.

`audit_case` (conversion) and `inference.scan_checks` (predict, evaluate) call the same functions,
so inference refuses the scans that conversion excludes, for the same reasons.
"""

from collections.abc import Sequence

import numpy as np

from liverseg_dist.config import CT_CHANNEL, ChannelConfig, CleaningConfig
from liverseg_dist.data.audit.anatomy import code_name, find_reference_organ, healthy_mask
from liverseg_dist.data.audit.label_geometry import has_identity_affine
from liverseg_dist.data.findings import Finding, Severity
from liverseg_dist.data.preprocessing.invalid_voxels import (
    AIR_HU,
    InvalidVoxels,
    invalid_fraction,
    store_voxels,
)
from liverseg_dist.errors import printable
from liverseg_dist.labels import LITS_SCHEME, LabelScheme, Structure
from liverseg_dist.volume import CANONICAL_ORIENTATION, Volume

SLAB_SLICES = 64
VERY_FEW_SLICES = 8
LIVER_HU = (-100.0, 300.0)
"""Median HU of a liver, with a margin: from fat to haemochromatosis and contrast agent."""
OFFSET_LIVER_HU = (850.0, 1400.0)
"""The same if 1024 was not subtracted."""
NO_AIR_HU = -200.0
"""A CT whose lowest values are above this shows no air: a crop, or grey values instead of HU."""
MIN_HU_RANGE = 100.0
BODY_HU = -300.0
MIN_BODY_FRACTION = 0.01
SAMPLE_SLICES = 64
SAMPLE_STEP = 4
MAX_MINOR_PADDING_FRACTION = 1e-3
"""Up to this fraction of the voxels, padding values are only an info."""
MIN_FLOOR_HU = -10.0
"""Values that begin below this are no grey values (nnU-Net's clip for LiTS begins at -17)."""
SIGNED_BYTE_RANGE = (-128.0, 127.0)
"""Grey values of 8 bits with a sign, the exception from `MIN_FLOOR_HU`."""
FLOOR_BAND_FRACTION = 0.03
"""Fraction of the value range that counts as the lowest values."""
MIN_BACKGROUND_FRACTION = 0.05
"""An image with more than this fraction of its voxels in the lowest band has a background."""
VOXEL_LIMITS_MM = (0.15, 20.0)
"""Voxel edges of CTs, with a margin: a header in cm gives 0.05 to 0.1."""
EXTENT_LIMITS_MM = (60.0, 1000.0)
"""Field of view of CTs in plane, with a margin: a header in cm gives about 40."""
MAX_LENGTH_MM = 2500.0
MIN_TILT_DEGREES = 1.0
PERCENTILES = (1, 25, 50, 75, 99)
CT_AIR_HU = (-1100.0, -900.0)
"""Air of a CT in HU, with a margin."""
MIN_AIR_FRACTION = 0.05
CT_TISSUE_HU = (-100.0, 150.0)
"""Soft tissue and fat of a CT: most voxels of a body."""
MIN_TISSUE_FRACTION = 0.5
MAX_SHOWN_SLICES = 8


def audit_image(
    image: Volume,
    cleaning: CleaningConfig,
    notes: Sequence[Finding] = (),
    label: Volume | None = None,
    channel: ChannelConfig = CT_CHANNEL,
    labels: LabelScheme = LITS_SCHEME,
) -> tuple[list[Finding], dict[str, object]]:
    """Audit a scan without its label.

    Args:
        image: HU for CT, else arbitrary units, in any orientation.
        cleaning: Limits.
        notes: Findings of the reader.
        label: A label on the image's grid, if one is known: the HU of the liver are then measured
            instead of estimated.
        channel: The channel that the scan is declared as.
        labels: Scheme of the label.

    Returns:
        Findings, the reader's first, and JSON-able facts.
    """
    facts = collect_image_facts(image)
    findings = [*notes, *check_grid(image, cleaning)]
    findings += check_invalid_voxels(image, cleaning, facts, channel)
    return [*findings, *check_intensity(image, label, facts, channel, labels)], facts


def audit_further_channel(
    image: Volume, cleaning: CleaningConfig, channel: ChannelConfig
) -> tuple[list[Finding], dict[str, object]]:
    """Audit another channel than the first one of a scan; messages name the channel.

    Slices and tilt are those of the stored grid, which is the first channel's, so they are not
    checked here.
    """
    facts = collect_image_facts(image)
    findings = check_invalid_voxels(image, cleaning, facts, channel)
    findings += check_intensity(image, None, facts, channel)
    named = []
    for finding in findings:
        message = f"channel {channel.name}: {finding.message}"
        named.append(Finding(finding.severity, finding.code, message))
    return named, facts


def collect_image_facts(image: Volume) -> dict[str, object]:
    """Shape, spacing and orientation, JSON-able."""
    return {
        "shape_zyx": list(image.shape),
        "spacing_mm": [round(mm, 6) for mm in image.spacing_mm],
        "orientation": image.grid.orientation,
    }


# --- geometry ----------------------------------------------------------------------------------


def check_grid(image: Volume, cleaning: CleaningConfig) -> list[Finding]:
    """Check voxel sizes, number of slices and tilt."""
    findings = []
    if has_identity_affine(image.grid):
        message = (
            "identity affine with voxels of 1 mm: the header lost its geometry (known for LiTS 28 "
            "to 47); give the true sizes in convert.cleaning.spacing_table"
        )
        findings.append(Finding("warning", "identity_affine", message))
    else:
        findings += _check_sizes(image)
    findings += _check_slices(image, cleaning)
    tilt = _measure_tilt_degrees(image)
    if tilt > MIN_TILT_DEGREES:
        message = f"axes are {tilt:.1f} degrees off the world's; the grid is kept as it is"
        findings.append(Finding("info", "oblique", message))
    return findings


def _check_sizes(image: Volume) -> list[Finding]:
    canonical = image.reoriented(CANONICAL_ORIENTATION)
    spacing_mm = canonical.spacing_mm
    extent_mm = [n * mm for n, mm in zip(canonical.shape, spacing_mm, strict=True)]
    # A scan may be as long as a person; in plane it is limited by the scanner's bore.
    length_mm, in_plane_mm = extent_mm[0], extent_mm[1:]
    min_voxel, max_voxel = VOXEL_LIMITS_MM
    min_extent, max_extent = EXTENT_LIMITS_MM
    voxel_ok = min_voxel <= min(spacing_mm) and max(spacing_mm) <= max_voxel
    extent_ok = min_extent <= min(in_plane_mm) and max(in_plane_mm) <= max_extent
    if voxel_ok and extent_ok and length_mm <= MAX_LENGTH_MM:
        return []
    voxels = " x ".join(f"{mm:.3g}" for mm in spacing_mm)
    extent = " x ".join(f"{mm:.0f}" for mm in extent_mm)
    message = (
        f"voxels of {voxels} mm, a field of view of {extent} mm (z, y, x): not plausible for a "
        "scan of a body; is the header in mm?"
    )
    return [Finding("warning", "implausible_voxel_size", message)]


def _check_slices(image: Volume, cleaning: CleaningConfig) -> list[Finding]:
    canonical = image.reoriented(CANONICAL_ORIENTATION)
    slices = canonical.shape[0]
    # Resampling may leave fewer slices than the file has: 3 slices of 1 mm are one of 3 mm.
    slice_mm = canonical.spacing_mm[0]
    slab_slice_mm = cleaning.spacing_mm[0] if cleaning.spacing_mm is not None else slice_mm
    filled = min(slices, max(1, round(slices * slice_mm / slab_slice_mm)))
    if filled < cleaning.min_slices:
        message = (
            f"{slices} slices fill {filled} of the {SLAB_SLICES} slices of a slab, all others are "
            f"padding; at least {cleaning.min_slices} are required (convert.cleaning.min_slices)"
        )
        return [Finding("error", "very_few_slices", message)]
    message = f"{slices} slices, fewer than the {SLAB_SLICES} of a slab"
    if slices < VERY_FEW_SLICES:
        return [Finding("warning", "very_few_slices", message)]
    return [Finding("info", "few_slices", message)] if slices < SLAB_SLICES else []


def _measure_tilt_degrees(image: Volume) -> float:
    """Largest angle between an axis of the scan and the nearest axis of the world."""
    directions = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
    cosines = np.abs(directions).max(axis=0)
    return float(np.degrees(np.arccos(np.clip(cosines.min(), -1, 1))))


# --- voxels without a measurement --------------------------------------------------------------


def check_invalid_voxels(
    image: Volume,
    cleaning: CleaningConfig,
    facts: dict[str, object],
    channel: ChannelConfig = CT_CHANNEL,
) -> list[Finding]:
    """Report NaN, padding and blank slices; too many of them are an error. Adds to `facts`."""
    canonical = image.reoriented(CANONICAL_ORIENTATION)
    # In canonical orientation, so that blank slices are counted along z.
    _, invalid, scale = store_voxels(canonical.voxels, channel)
    facts["broken"] = invalid.to_json()
    findings = _report_invalid_voxels(invalid, int(np.prod(canonical.shape)), channel)
    if not scale.is_identity:
        message = f"stored as int16: value = {scale.slope:.6g} * stored + {scale.intercept:.6g}"
        findings.append(Finding("info", "scaled_values", message))
    fraction = invalid_fraction(invalid, canonical.shape)
    limit = cleaning.max_broken_fraction
    if fraction > limit:
        message = (
            f"{100 * fraction:.1f} % broken voxels; at most {100 * limit:.1f} % are accepted "
            "(convert.cleaning.max_broken_fraction)"
        )
        findings.append(Finding("error", "too_many_broken_voxels", message))
    return findings


def _report_invalid_voxels(
    invalid: InvalidVoxels, voxels: int, channel: ChannelConfig
) -> list[Finding]:
    findings = []
    if invalid.nonfinite_voxels:
        outside = f"air ({AIR_HU} HU)" if channel.is_ct else "0"
        message = f"{invalid.nonfinite_voxels:,} NaN or infinite voxels become {outside}"
        findings.append(Finding("warning", "broken_voxels", message))
    if invalid.padding_voxels:
        message = (
            f"{invalid.padding_voxels:,} voxels below {AIR_HU} HU (padding, or noise in air) "
            "become air"
        )
        is_minor = invalid.padding_voxels <= MAX_MINOR_PADDING_FRACTION * voxels
        severity: Severity = "info" if is_minor else "warning"
        findings.append(Finding(severity, "padding_values", message))
    if invalid.blank_slices:
        slices = ", ".join(map(str, invalid.blank_slices[:MAX_SHOWN_SLICES]))
        message = (
            f"{len(invalid.blank_slices)} blank slice(s) within the scan are interpolated: {slices}"
        )
        findings.append(Finding("warning", "blank_slices", message))
    return findings


# --- intensity ---------------------------------------------------------------------------------


def check_intensity(
    image: Volume,
    label: Volume | None,
    facts: dict[str, object],
    channel: ChannelConfig = CT_CHANNEL,
    labels: LabelScheme = LITS_SCHEME,
) -> list[Finding]:
    """Check that the values are those of the channel; adds their range to `facts`.

    A CT must be in HU: with a label of an organ whose HU are known (`anatomy`) its median is
    measured, without one the soft tissue is estimated. Other channels may have any values, but those of a CT get a warning.
    """
    sample = sample_voxels(image)
    if not sample.size:
        return []
    low, high = float(np.nanmin(image.voxels)), float(np.nanmax(image.voxels))
    unit = "hu" if channel.is_ct else "value"
    facts[f"{unit}_range"] = [low, high]
    percentiles = {}
    for percentile in PERCENTILES:
        value = float(np.percentile(sample, percentile))
        # HU need one decimal; values of other units may all be below 1.
        percentiles[str(percentile)] = round(value, 1) if channel.is_ct else float(f"{value:.6g}")
    facts[f"{unit}_percentiles"] = percentiles
    if low == high:
        message = f"every voxel is {low:g}; the file holds no scan"
        return [Finding("error", "constant_image", message)]
    if not channel.is_ct:
        return _notice_ct(sample, channel)
    organ = find_reference_organ(labels)
    median = None
    if label is not None and organ is not None:
        values = image.voxels[healthy_mask(label.voxels, labels, organ)]
        median = float(np.median(values)) if values.size else None
        facts[f"{code_name(organ)}_median_hu"] = median
    return _judge_intensity(low, high, sample, median, organ)


def looks_like_ct(sample: np.ndarray) -> bool:
    """Whether values are probably HU: much air near -1000, and a body of soft tissue and fat."""
    is_air = (sample >= CT_AIR_HU[0]) & (sample <= CT_AIR_HU[1])
    body = sample[sample > BODY_HU]
    if np.mean(is_air) < MIN_AIR_FRACTION or not body.size:
        return False
    is_tissue = (body >= CT_TISSUE_HU[0]) & (body <= CT_TISSUE_HU[1])
    return float(np.mean(is_tissue)) >= MIN_TISSUE_FRACTION


def _notice_ct(sample: np.ndarray, channel: ChannelConfig) -> list[Finding]:
    if not looks_like_ct(sample):
        return []
    message = (
        f"declared as {channel.modality}, but the values are those of a CT in HU (air near -1000); "
        "if it is one, correct dataset.json or convert.channels"
    )
    return [Finding("warning", "looks_like_ct", message)]


def sample_voxels(image: Volume) -> np.ndarray:
    """Finite values of about 64 slices, every fourth voxel in plane; float32."""
    step_z = 1 + image.shape[0] // SAMPLE_SLICES
    sample = image.voxels[::step_z, ::SAMPLE_STEP, ::SAMPLE_STEP].astype(np.float32)
    return sample[np.isfinite(sample)]


def _judge_intensity(
    low: float, high: float, sample: np.ndarray, median: float | None, organ: Structure | None
) -> list[Finding]:
    """A CT in HU has air far below zero. Without air: another modality, shifted or scaled values.

    Args:
        low: Lowest value of all voxels.
        high: Highest value of all voxels.
        sample: See `sample_voxels`.
        median: HU of the organ, None without label.
        organ: The organ.
    """
    # A percentile, not the minimum: resampling (cubic, sinc) leaves a few negative voxels beside
    # bright ones in MR as well.
    if np.percentile(sample, 0.1) > NO_AIR_HU:
        tissue = median
        if tissue is None:
            # Without label: tissue is the brighter part of the image.
            tissue = float(np.median(sample[sample > sample.mean()]))
        if _is_offset_tissue_hu(tissue):
            return [_report_missing_offset(low, high, tissue)]
        is_narrow = high - low < MIN_HU_RANGE
        if not _is_tissue_hu(tissue) or is_narrow or _has_background(low, high, sample):
            return [_report_not_ct(low, high, tissue)]
    elif median is None or not _is_tissue_hu(median):
        # Low values alone are no proof: padding of -2000 beside values without offset, or a factor.
        bright = _estimate_tissue_hu(sample)
        if bright is not None and bright > LIVER_HU[1]:
            if _is_offset_tissue_hu(bright):
                return [_report_missing_offset(low, high, bright)]
            return [_report_not_ct(low, high, bright)]
    if median is not None and organ is not None and not _is_tissue_hu(median):
        message = (
            f"the {printable(organ.name)}'s median is {median:.0f} HU; "
            "does the label belong to this image?"
        )
        return [Finding("warning", f"{code_name(organ)}_hu_implausible", message)]
    return []


def _estimate_tissue_hu(sample: np.ndarray) -> float | None:
    """Median of the brighter part of the body; None if almost nothing is denser than air."""
    body = sample[sample > BODY_HU]
    if body.size < max(1.0, MIN_BODY_FRACTION * sample.size):
        return None
    # Above the mean of the body: without fat and air in the bowel.
    bright = body[body > body.mean()]
    return float(np.median(bright)) if bright.size else None


def _has_background(low: float, high: float, sample: np.ndarray) -> bool:
    """Whether the lowest values, about 0 or above, are those of a background.

    Air is -1000 HU, so an image with a background at 0 is not a CT in HU, but has grey values of 8
    bits or is MR. A crop from inside the body has no background: its lowest values are rare.
    """
    # Percentiles, not extremes: a few outliers would shift the band.
    floor, top = np.percentile(sample, (1, 99))
    if floor < MIN_FLOOR_HU and (low, high) != SIGNED_BYTE_RANGE:
        return False
    is_low = sample <= floor + FLOOR_BAND_FRACTION * (top - floor)
    return float(np.mean(is_low)) >= MIN_BACKGROUND_FRACTION


def _is_tissue_hu(hu: float) -> bool:
    return LIVER_HU[0] <= hu <= LIVER_HU[1]


def _is_offset_tissue_hu(hu: float) -> bool:
    return OFFSET_LIVER_HU[0] <= hu <= OFFSET_LIVER_HU[1]


def _report_missing_offset(low: float, high: float, tissue: float) -> Finding:
    message = (
        f"values {low:g} to {high:g}, tissue near {tissue:.0f}: 1024 was not subtracted; "
        "correct scl_inter"
    )
    return Finding("error", "hu_offset_missing", message)


def _report_not_ct(low: float, high: float, tissue: float) -> Finding:
    message = (
        f"values from {low:g} to {high:g}, tissue near {tissue:.4g}: "
        "not HU of a CT (MR, or rescaled?)"
    )
    return Finding("error", "not_ct_like", message)
