"""What is right and wrong with a case, before anything is done with it: `audit_case(image, label)`.

The label comes back on the image's own grid, repaired where that is safe. Findings have a severity and a stable code:

  error    the case is excluded    hu_offset_missing not_ct_like constant_image too_many_broken_voxels
                                   very_few_slices (below convert.cleaning.min_slices) label_values
                                   label_fractional label_no_overlap label_empty label_missing (by setting)
  warning  look at it              identity_affine liver_hu_implausible liver_volume tumour_outside_liver
                                   liver_on_the_left very_few_slices label_reoriented label_resampled label_shifted
                                   label_cut label_header_lost broken_voxels padding_values blank_slices
                                   implausible_voxel_size (and the reader's notes on the header)
  info     worth knowing           few_slices no_tumour oblique label_missing (a scan kept without label)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cc3d
import numpy as np

from liverseg_dist.config import CleaningConfig
from liverseg_dist.data.audit.image_audit import (
    check_grid,
    check_intensity,
    check_invalid_voxels,
    collect_image_facts,
)
from liverseg_dist.data.audit.label_geometry import match_label, measure_liver_offset_mm
from liverseg_dist.data.findings import Finding
from liverseg_dist.labels import CLASS_NAMES, LIVER, NUM_CLASSES, TUMOUR
from liverseg_dist.volume import Volume

Status = Literal["kept", "repaired", "imputed", "unlabelled", "excluded"]

LABEL_TOLERANCE = 1e-3
LIVER_LIMITS_ML = (300.0, 5000.0)
MAX_LEFT_OFFSET_MM = 5.0
REPAIR_CODES = frozenset(
    {"label_reoriented", "label_resampled", "label_shifted", "label_header_lost"}
)


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
    facts = collect_image_facts(image)
    findings += check_grid(image, cleaning)
    findings += check_invalid_voxels(image, cleaning, facts)
    repaired: Volume | None = None
    if label is not None:
        whole, problem = _convert_label_values(label)
        if problem is not None:
            findings.append(problem)
        else:
            matched = match_label(image.grid, whole)
            findings += matched.findings
            repaired = matched.label
    if repaired is not None:
        findings += _check_label(repaired, facts)
        findings += check_side(image, repaired, facts)
    findings += check_intensity(image, repaired, facts)
    if label is None:
        named = [f for f in findings if f.code == "label_missing"]
        findings = [f for f in findings if f.code != "label_missing"] + _report_missing_label(
            cleaning, training, named
        )
    return AuditResult(_decide_status(findings, repaired), repaired, tuple(findings), facts)


def _decide_status(findings: Sequence[Finding], label: Volume | None) -> Status:
    if any(finding.severity == "error" for finding in findings):
        return "excluded"
    if label is None:
        return "unlabelled"
    return "repaired" if any(finding.code in REPAIR_CODES for finding in findings) else "kept"


def _report_missing_label(
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


def _convert_label_values(label: Volume) -> tuple[Volume, Finding | None]:
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
    values, counts = _count_values(voxels)
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


def _count_values(voxels: np.ndarray) -> tuple[list[int], list[int]]:
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
    values, counts = _count_values(label.voxels)
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
    found += check_liver_volume((per_class[LIVER] + per_class[TUMOUR]) * label.grid.voxel_volume_ml)
    if per_class[TUMOUR] == 0:
        facts["tumours"] = 0
        found.append(Finding("info", "no_tumour", "no tumour is labelled"))
        return found
    tumours, findings = check_tumours(label.voxels)
    facts["tumours"] = tumours
    return [*found, *findings]


def check_liver_volume(liver_ml: float) -> list[Finding]:
    """Whether a liver (with its tumours) can have this volume."""
    low, high = LIVER_LIMITS_ML
    if low <= liver_ml <= high:
        return []
    message = f"a liver of {liver_ml:.0f} ml, not {low:.0f} to {high:.0f} (a cut scan, or a wrong voxel size?)"
    return [Finding("warning", "liver_volume", message)]


def check_tumours(label_zyx: np.ndarray) -> tuple[int, list[Finding]]:
    """(number of tumours, a finding if some lie outside the liver)."""
    tumours, outside, outside_voxels = count_detached_tumours(label_zyx)
    if not outside:
        return tumours, []
    message = f"{outside} of {tumours} tumours ({outside_voxels:,} voxels) do not touch the liver"
    return tumours, [Finding("warning", "tumour_outside_liver", message)]


def check_side(image: Volume, label: Volume, facts: dict[str, object]) -> list[Finding]:
    """A world that was flipped (LPS taken for RAS, a lost sign) puts the liver on the wrong side of the body."""
    right_mm = measure_liver_offset_mm(image, label)
    if right_mm is None:
        return []
    facts["liver_right_of_middle_mm"] = round(right_mm, 1)
    if right_mm >= -MAX_LEFT_OFFSET_MM:
        return []
    message = f"the liver's centre lies {-right_mm:.0f} mm to the left of the body's: a flipped header, or situs inversus"
    return [Finding("warning", "liver_on_the_left", message)]


def count_detached_tumours(label_zyx: np.ndarray) -> tuple[int, int, int]:
    """(tumour components, those that touch no liver voxel, voxels of these); 26 neighbours count as touching.

    Memory: 4 bytes for each voxel of the box around the tumours.
    """
    box = _find_tumour_box(label_zyx)
    if box is None:
        return 0, 0, 0
    part = label_zyx[box]
    tumour = part == TUMOUR
    tumours = cc3d.connected_components(tumour.view(np.uint8), connectivity=26)
    count = int(tumours.max())
    stray = np.ones(count + 1, dtype=bool)
    stray[np.unique(tumours[_dilate_mask(part == LIVER) & tumour])] = False
    stray[0] = False
    return count, int(np.count_nonzero(stray)), int(np.count_nonzero(stray[tumours]))


def _find_tumour_box(label_zyx: np.ndarray) -> tuple[slice, ...] | None:
    """The box around all tumours, and a voxel more on each side."""
    in_plane = np.zeros(label_zyx.shape[1:], dtype=bool)
    planes = []
    for z, slice_yx in enumerate(label_zyx):  # slice by slice: no boolean copy of a large scan
        tumour = slice_yx == TUMOUR
        if tumour.any():
            planes.append(z)
            in_plane |= tumour
    if not planes:
        return None
    rows, columns = (np.flatnonzero(in_plane.any(axis=axis)) for axis in (1, 0))
    ends = ((planes[0], planes[-1]), (rows[0], rows[-1]), (columns[0], columns[-1]))
    return tuple(slice(max(0, int(first) - 1), int(last) + 2) for first, last in ends)


def _dilate_mask(mask_zyx: np.ndarray) -> np.ndarray:
    """The mask and its 26 neighbours."""
    for axis in range(3):
        before = np.moveaxis(mask_zyx, axis, 0)
        after = before.copy()
        after[1:] |= before[:-1]
        after[:-1] |= before[1:]
        mask_zyx = np.moveaxis(after, 0, axis)
    return mask_zyx
