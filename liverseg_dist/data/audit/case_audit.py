"""What is right and wrong with a case, before anything is done with it: `audit_case(image, label)`.

The label comes back on the image's own grid, repaired where that is safe. Findings have a severity and a stable code:

  error    the case is excluded    hu_offset_missing not_ct_like constant_image too_many_broken_voxels label_values
                                   label_fractional label_no_overlap label_empty label_missing (by setting)
  warning  look at it              identity_affine liver_hu_implausible liver_volume tumour_outside_liver
                                   liver_on_the_left very_few_slices label_reoriented label_resampled label_shifted
                                   label_cut label_header_lost broken_voxels padding_values blank_slices
                                   (and the reader's notes on the header)
  info     worth knowing           few_slices no_tumour oblique label_missing (a scan kept without label)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cc3d
import numpy as np

from liverseg_dist.config import CleaningConfig
from liverseg_dist.data.audit.findings import Finding, Severity
from liverseg_dist.data.audit.label_geometry import (
    is_identity,
    liver_right_of_middle_mm,
    match_label,
)
from liverseg_dist.data.preprocessing.invalid_voxels import (
    AIR_HU,
    InvalidVoxels,
    fill_invalid_voxels,
    invalid_fraction,
)
from liverseg_dist.labels import CLASS_NAMES, LIVER, NUM_CLASSES, TUMOUR
from liverseg_dist.volume import CANONICAL_ORIENTATION, Volume

Status = Literal["kept", "repaired", "imputed", "unlabelled", "excluded"]

SLAB_SLICES = 64
VERY_FEW_SLICES = 8
LABEL_TOLERANCE = 1e-3
LIVER_HU = (-100.0, 300.0)
"""Median HU of a liver: fat to haemochromatosis and contrast, with room."""
OFFSET_LIVER_HU = (850.0, 1400.0)
"""The same when 1024 was never subtracted."""
LIVER_ML = (300.0, 5000.0)
LEFT_MM = 5.0
SAMPLE_STEP = 4
FEW_PADDING = 1e-3
REPAIRS = frozenset({"label_reoriented", "label_resampled", "label_shifted", "label_header_lost"})


@dataclass(frozen=True)
class AuditResult:
    """`label` lies on the image's grid (uint8; None without one). `facts` is JSON-able."""

    status: Status
    label: Volume | None
    findings: tuple[Finding, ...]
    facts: dict[str, object]


def audit_case(
    image: Volume,
    label: Volume | None,
    cleaning: CleaningConfig,
    notes: Sequence[Finding] = (),
    *,
    training: bool = True,
) -> AuditResult:
    """Judge one case. `notes`: what reading its files found; `training`: a label was to be expected."""
    findings = list(notes)
    facts: dict[str, object] = {
        "shape_zyx": list(image.shape),
        "spacing_mm": [round(mm, 6) for mm in image.spacing_mm],
        "orientation": image.grid.orientation,
    }
    findings += _check_grid(image)
    findings += _check_broken(image, cleaning, facts)
    repaired: Volume | None = None
    if label is not None:
        whole, problem = _whole_label(label)
        if problem is not None:
            findings.append(problem)
        else:
            matched = match_label(image.grid, whole)
            findings += matched.findings
            repaired = matched.label
    if repaired is not None:
        findings += _check_label(repaired, facts)
        findings += _check_side(image, repaired, facts)
    findings += _check_intensity(image, repaired, facts)
    if label is None:
        named = [f for f in findings if f.code == "label_missing"]
        findings = [f for f in findings if f.code != "label_missing"] + _missing_label(
            cleaning, training, named
        )
    return AuditResult(_status(findings, repaired), repaired, tuple(findings), facts)


def _status(findings: Sequence[Finding], label: Volume | None) -> Status:
    if any(finding.severity == "error" for finding in findings):
        return "excluded"
    if label is None:
        return "unlabelled"
    return "repaired" if any(finding.code in REPAIRS for finding in findings) else "kept"


def _missing_label(
    cleaning: CleaningConfig, training: bool, named: Sequence[Finding]
) -> list[Finding]:
    """One finding in place of those that the data set's index gave (`named`)."""
    if not training:
        return []
    why = named[0].message if named else "no label"
    if cleaning.missing_label == "exclude":
        message = f"{why}; left out (convert.cleaning.missing_label=unlabelled or impute keeps such scans)"
        return [Finding("error", "label_missing", message)]
    if cleaning.missing_label == "impute":
        return [
            Finding(
                "warning", "label_missing", f"{why}; to be labelled by the run convert.labels_from"
            )
        ]
    return [Finding("info", "label_missing", f"{why}; kept as an unlabelled scan")]


def _check_grid(image: Volume) -> list[Finding]:
    found = []
    if is_identity(image.grid):
        message = (
            "identity affine with voxels of 1 mm: the header lost its geometry (known for LiTS 28 to 47); "
            "give the true sizes in convert.cleaning.spacing_table"
        )
        found.append(Finding("warning", "identity_affine", message))
    slices = image.reoriented(CANONICAL_ORIENTATION).shape[0]
    if slices < VERY_FEW_SLICES:
        found.append(
            Finding(
                "warning",
                "very_few_slices",
                f"{slices} slices, fewer than the {SLAB_SLICES} of a slab",
            )
        )
    elif slices < SLAB_SLICES:
        found.append(
            Finding(
                "info", "few_slices", f"{slices} slices, fewer than the {SLAB_SLICES} of a slab"
            )
        )
    tilt = _tilt_degrees(image)
    if tilt > 1:
        found.append(
            Finding(
                "info",
                "oblique",
                f"axes are {tilt:.1f} degrees off the world's; the grid is kept as it is",
            )
        )
    return found


def _tilt_degrees(image: Volume) -> float:
    directions = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
    return float(np.degrees(np.arccos(np.clip(np.abs(directions).max(axis=0).min(), -1, 1))))


def _check_broken(
    image: Volume, cleaning: CleaningConfig, facts: dict[str, object]
) -> list[Finding]:
    canonical = image.reoriented(CANONICAL_ORIENTATION)
    _, broken = fill_invalid_voxels(canonical.voxels)
    facts["broken"] = broken.to_json()
    found = _broken_findings(broken, int(np.prod(canonical.shape)))
    share = invalid_fraction(broken, canonical.shape)
    if share > cleaning.max_broken_fraction:
        limit = cleaning.max_broken_fraction
        message = f"{100 * share:.1f} % broken voxels; at most {100 * limit:.1f} % (convert.cleaning.max_broken_fraction)"
        found.append(Finding("error", "too_many_broken_voxels", message))
    return found


def _broken_findings(broken: InvalidVoxels, voxels: int) -> list[Finding]:
    found = []
    if broken.nonfinite_voxels:
        message = f"{broken.nonfinite_voxels:,} NaN or infinite voxels become air ({AIR_HU} HU)"
        found.append(Finding("warning", "broken_voxels", message))
    if broken.padding_voxels:
        message = f"{broken.padding_voxels:,} voxels below {AIR_HU} HU (padding, or noise in air) become air"
        severity: Severity = "warning" if broken.padding_voxels > FEW_PADDING * voxels else "info"
        found.append(Finding(severity, "padding_values", message))
    if broken.blank_slices:
        some = ", ".join(map(str, broken.blank_slices[:8]))
        message = (
            f"{len(broken.blank_slices)} blank slice(s) within the scan are interpolated: {some}"
        )
        found.append(Finding("warning", "blank_slices", message))
    return found


def _whole_label(label: Volume) -> tuple[Volume, Finding | None]:
    """The label as uint8, or what is wrong with its values."""
    voxels = label.voxels
    if voxels.dtype.kind == "f":
        rounded = np.rint(np.nan_to_num(voxels, nan=0.5, posinf=0.5, neginf=0.5))
        fractional = int(np.count_nonzero(~(np.abs(voxels - rounded) <= LABEL_TOLERANCE)))
        if fractional:
            return label, Finding(
                "error", "label_fractional", f"{fractional:,} label voxels are no whole numbers"
            )
        voxels = rounded
    values, counts = _value_counts(voxels)
    strange = [value for value in values if value not in range(NUM_CLASSES)]
    if strange:
        shown = ", ".join(
            f"{value} ({counts[values.index(value)]:,} voxels)" for value in strange[:5]
        )
        return label, Finding(
            "error",
            "label_values",
            f"label values {shown}; expected 0 background, 1 liver, 2 tumour",
        )
    return label.with_voxels(voxels.astype(np.uint8, copy=False)), None


def _value_counts(voxels: np.ndarray) -> tuple[list[int], list[int]]:
    totals: dict[int, int] = {}
    for slice_yx in voxels:  # a slice at a time: counting makes an int64 copy
        if voxels.dtype == np.uint8:
            counts = np.bincount(slice_yx.reshape(-1))
            values = np.flatnonzero(counts)
            counts = counts[values]
        else:
            values, counts = np.unique(slice_yx, return_counts=True)
        for value, count in zip(values, counts, strict=True):
            totals[int(value)] = totals.get(int(value), 0) + int(count)
    return sorted(totals), [totals[value] for value in sorted(totals)]


def _check_label(label: Volume, facts: dict[str, object]) -> list[Finding]:
    values, counts = _value_counts(label.voxels)
    voxels = dict(zip(values, counts, strict=True))
    per_class = [voxels.get(value, 0) for value in range(NUM_CLASSES)]
    facts["class_voxels"] = per_class
    facts["volumes_ml"] = {
        name: round(n * label.grid.voxel_volume_ml, 3)
        for name, n in zip(CLASS_NAMES[1:], per_class[1:], strict=True)
    }
    if per_class[LIVER] == 0 and per_class[TUMOUR] == 0:
        return [Finding("error", "label_empty", "the label is empty: neither liver nor tumour")]
    found = []
    liver_ml = (per_class[LIVER] + per_class[TUMOUR]) * label.grid.voxel_volume_ml
    if not LIVER_ML[0] <= liver_ml <= LIVER_ML[1]:
        low, high = LIVER_ML
        message = f"a liver of {liver_ml:.0f} ml, not {low:.0f} to {high:.0f} (a cut scan, or a wrong voxel size?)"
        found.append(Finding("warning", "liver_volume", message))
    if per_class[TUMOUR] == 0:
        facts["tumours"] = 0
        found.append(Finding("info", "no_tumour", "no tumour is labelled"))
        return found
    tumours, outside, outside_voxels = tumours_and_strays(label.voxels)
    facts["tumours"] = tumours
    if outside:
        message = (
            f"{outside} of {tumours} tumours ({outside_voxels:,} voxels) do not touch the liver"
        )
        found.append(Finding("warning", "tumour_outside_liver", message))
    return found


def _check_side(image: Volume, label: Volume, facts: dict[str, object]) -> list[Finding]:
    """A world that was flipped (LPS taken for RAS, a lost sign) puts the liver on the wrong side of the body."""
    right_mm = liver_right_of_middle_mm(image, label)
    if right_mm is None:
        return []
    facts["liver_right_of_middle_mm"] = round(right_mm, 1)
    if right_mm >= -LEFT_MM:
        return []
    message = f"the liver's centre lies {-right_mm:.0f} mm to the left of the body's: a flipped header, or situs inversus"
    return [Finding("warning", "liver_on_the_left", message)]


def tumours_and_strays(label_zyx: np.ndarray) -> tuple[int, int, int]:
    """(tumour components, those that touch no liver voxel, voxels of these); 26 neighbours count as touching."""
    used = [
        np.flatnonzero((label_zyx > 0).any(axis=tuple(a for a in range(3) if a != axis)))
        for axis in range(3)
    ]
    box = label_zyx[tuple(slice(int(u[0]), int(u[-1]) + 1) for u in used)]
    organs = cc3d.connected_components(box > 0, connectivity=26)
    has_liver = np.zeros(int(organs.max()) + 1, dtype=bool)
    has_liver[np.unique(organs[box == LIVER])] = True
    tumours = cc3d.connected_components(box == TUMOUR, connectivity=26)
    inside = (box == TUMOUR) & has_liver[organs]
    count = int(tumours.max())
    touching = len(np.unique(tumours[inside]))
    return count, count - touching, int(np.count_nonzero((box == TUMOUR) & ~has_liver[organs]))


def _check_intensity(
    image: Volume, label: Volume | None, facts: dict[str, object]
) -> list[Finding]:
    sample = image.voxels[:: 1 + image.shape[0] // 64, ::SAMPLE_STEP, ::SAMPLE_STEP].astype(
        np.float32
    )
    sample = sample[np.isfinite(sample)]
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


def _judge_intensity(
    low: float, high: float, sample: np.ndarray, liver_median: float | None
) -> list[Finding]:
    """A CT in HU has air far below zero; what has none is another modality, or was shifted or scaled."""
    if low > -200:
        tissue = (
            liver_median
            if liver_median is not None
            else float(np.median(sample[sample > sample.mean()]))
        )
        if OFFSET_LIVER_HU[0] <= tissue <= OFFSET_LIVER_HU[1]:
            message = f"values {low:g} to {high:g}, tissue near {tissue:.0f}: 1024 was not subtracted; correct scl_inter"
            return [Finding("error", "hu_offset_missing", message)]
        if not LIVER_HU[0] <= tissue <= LIVER_HU[1] or high - low < 100:
            message = f"values from {low:g} to {high:g}, tissue near {tissue:.4g}: not HU of a CT (MR, or rescaled?)"
            return [Finding("error", "not_ct_like", message)]
    if liver_median is not None and not LIVER_HU[0] <= liver_median <= LIVER_HU[1]:
        message = (
            f"the liver's median is {liver_median:.0f} HU; does the label belong to this image?"
        )
        return [Finding("warning", "liver_hu_implausible", message)]
    return []
