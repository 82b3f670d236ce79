"""Audit of a case before anything is done with it: `audit_case(image, label)`.

The label is returned on the image's grid, repaired if that is safe. Each finding has a severity and
a stable code:

  error    the case is excluded    hu_offset_missing not_ct_like constant_image
                                   too_many_broken_voxels label_values label_fractional
                                   label_no_overlap label_empty label_missing (by setting)
                                   very_few_slices (below convert.cleaning.min_slices)
  warning  should be looked at     identity_affine implausible_voxel_size very_few_slices
                                   liver_hu_implausible liver_volume liver_on_the_left
                                   tumour_outside_liver label_reoriented label_resampled
                                   label_shifted label_cut label_header_lost broken_voxels
                                   padding_values blank_slices looks_like_ct
                                   (and the reader's notes)
  info     needs no action         few_slices no_tumour oblique
                                   label_missing (a scan kept without label)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cc3d
import numpy as np

from liverseg_dist.config import CT_CHANNEL, ChannelConfig, CleaningConfig
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
MAX_SHOWN_VALUES = 5
REPAIR_CODES = frozenset(
    {"label_reoriented", "label_resampled", "label_shifted", "label_header_lost"}
)


@dataclass(frozen=True)
class AuditResult:
    """Status, repaired label and findings of a case."""

    status: Status
    label: Volume | None
    """On the image's grid, uint8. None without a usable label."""
    findings: tuple[Finding, ...]
    facts: dict[str, object]
    """JSON-able."""


def audit_case(
    image: Volume,
    label: Volume | None,
    cleaning: CleaningConfig,
    notes: Sequence[Finding] = (),
    *,
    training: bool = True,
    channel: ChannelConfig = CT_CHANNEL,
) -> AuditResult:
    """Audit one case.

    Args:
        image: The first channel of the scan: HU for CT, else arbitrary units; in any orientation.
        label: Class numbers, on any grid. None if the case has no label file.
        cleaning: Limits, and what to do without a label.
        notes: Findings of the reader about the files.
        training: Whether the case should have a label.
        channel: The channel of `image`.
    """
    findings = list(notes)
    facts = collect_image_facts(image)
    findings += check_grid(image, cleaning)
    findings += check_invalid_voxels(image, cleaning, facts, channel)
    # Image and label are judged independently: a bad label must not hide a bad image.
    repaired: Volume | None = None
    if label is not None:
        integer_label, problem = _convert_label_values(label)
        if problem is not None:
            findings.append(problem)
        else:
            match = match_label(image.grid, integer_label)
            findings += match.findings
            repaired = match.label
    if repaired is not None:
        findings += _check_label(repaired, facts)
        findings += check_side(image, repaired, facts, channel)
    findings += check_intensity(image, repaired, facts, channel)
    if label is None:
        # The policy for missing labels decides the severity, so the finding is replaced.
        index_findings = [f for f in findings if f.code == "label_missing"]
        findings = [f for f in findings if f.code != "label_missing"]
        findings += _report_missing_label(cleaning, training, index_findings)
    return AuditResult(_decide_status(findings, repaired), repaired, tuple(findings), facts)


def _decide_status(findings: Sequence[Finding], label: Volume | None) -> Status:
    if any(finding.severity == "error" for finding in findings):
        return "excluded"
    if label is None:
        return "unlabelled"
    is_repaired = any(finding.code in REPAIR_CODES for finding in findings)
    return "repaired" if is_repaired else "kept"


def _report_missing_label(
    cleaning: CleaningConfig, training: bool, index_findings: Sequence[Finding]
) -> list[Finding]:
    """One finding in place of `index_findings`, those of the data set's index."""
    if not training:
        return []
    reason = index_findings[0].message if index_findings else "no label"
    if cleaning.missing_label == "exclude":
        message = (
            f"{reason}; left out "
            "(convert.cleaning.missing_label=unlabelled or impute keeps such scans)"
        )
        return [Finding("error", "label_missing", message)]
    if cleaning.missing_label == "impute":
        message = f"{reason}; to be labelled by the run convert.labels_from"
        return [Finding("warning", "label_missing", message)]
    return [Finding("info", "label_missing", f"{reason}; kept as an unlabelled scan")]


# --- values of the label -----------------------------------------------------------------------


def _convert_label_values(label: Volume) -> tuple[Volume, Finding | None]:
    """The label as uint8, or the unchanged label and a finding about its values."""
    voxels = label.voxels
    if voxels.dtype.kind == "f":
        # 0.5 is farthest from any integer: NaN and infinity count as fractional.
        rounded = np.rint(np.nan_to_num(voxels, nan=0.5, posinf=0.5, neginf=0.5))
        fractional = int(np.count_nonzero(~(np.abs(voxels - rounded) <= LABEL_TOLERANCE)))
        if fractional:
            message = f"{fractional:,} label voxels are not integers"
            return label, Finding("error", "label_fractional", message)
        voxels = rounded
    counts = _count_values(voxels)
    unexpected = [value for value in counts if value not in range(NUM_CLASSES)]
    if unexpected:
        shown = ", ".join(
            f"{value} ({counts[value]:,} voxels)" for value in unexpected[:MAX_SHOWN_VALUES]
        )
        message = f"label values {shown}; expected 0 background, 1 liver, 2 tumour"
        return label, Finding("error", "label_values", message)
    return label.with_voxels(voxels.astype(np.uint8, copy=False)), None


def _count_values(voxels: np.ndarray) -> dict[int, int]:
    """Value -> number of voxels, in ascending order of the values."""
    totals: dict[int, int] = {}
    # By slice: both functions make an int64 copy of what they count.
    for slice_yx in voxels:
        if voxels.dtype == np.uint8:
            counts = np.bincount(slice_yx.reshape(-1))
            values = np.flatnonzero(counts)
            counts = counts[values]
        else:
            values, counts = np.unique(slice_yx, return_counts=True)
        for value, count in zip(values, counts, strict=True):
            totals[int(value)] = totals.get(int(value), 0) + int(count)
    return dict(sorted(totals.items()))


def _check_label(label: Volume, facts: dict[str, object]) -> list[Finding]:
    """Check volumes and tumours of a label on the image's grid; adds them to `facts`."""
    counts = _count_values(label.voxels)
    class_voxels = [counts.get(value, 0) for value in range(NUM_CLASSES)]
    facts["class_voxels"] = class_voxels
    voxel_ml = label.grid.voxel_volume_ml
    volumes_ml = {}
    for name, count in zip(CLASS_NAMES[1:], class_voxels[1:], strict=True):
        volumes_ml[name] = round(count * voxel_ml, 3)
    facts["volumes_ml"] = volumes_ml
    # A tumour is a part of the liver.
    liver_voxels = class_voxels[LIVER] + class_voxels[TUMOUR]
    if liver_voxels == 0:
        return [Finding("error", "label_empty", "the label is empty: neither liver nor tumour")]
    findings = check_liver_volume(liver_voxels * voxel_ml)
    if class_voxels[TUMOUR] == 0:
        facts["tumours"] = 0
        return [*findings, Finding("info", "no_tumour", "no tumour is labelled")]
    tumours, tumour_findings = check_tumours(label.voxels)
    facts["tumours"] = tumours
    return [*findings, *tumour_findings]


# --- anatomy -----------------------------------------------------------------------------------


def check_liver_volume(liver_ml: float) -> list[Finding]:
    """Check that the volume of a liver with its tumours is plausible."""
    low, high = LIVER_LIMITS_ML
    if low <= liver_ml <= high:
        return []
    message = (
        f"a liver of {liver_ml:.0f} ml, not {low:.0f} to {high:.0f} "
        "(a cropped scan, or a wrong voxel size?)"
    )
    return [Finding("warning", "liver_volume", message)]


def check_tumours(label_zyx: np.ndarray) -> tuple[int, list[Finding]]:
    """Number of tumours, and a finding if some do not touch the liver."""
    tumours, detached, detached_voxels = count_detached_tumours(label_zyx)
    if not detached:
        return tumours, []
    message = f"{detached} of {tumours} tumours ({detached_voxels:,} voxels) do not touch the liver"
    return tumours, [Finding("warning", "tumour_outside_liver", message)]


def check_side(
    image: Volume,
    label: Volume,
    facts: dict[str, object],
    channel: ChannelConfig = CT_CHANNEL,
) -> list[Finding]:
    """Check that the liver is on the right; adds its offset to `facts`.

    A flipped header (LPS read as RAS, a lost sign) puts it on the left.
    """
    offset_mm = measure_liver_offset_mm(image, label, channel)
    if offset_mm is None:
        return []
    facts["liver_right_of_middle_mm"] = round(offset_mm, 1)
    if offset_mm >= -MAX_LEFT_OFFSET_MM:
        return []
    message = (
        f"the liver's centre is {-offset_mm:.0f} mm to the left of the body's: "
        "a flipped header, or situs inversus"
    )
    return [Finding("warning", "liver_on_the_left", message)]


def count_detached_tumours(label_zyx: np.ndarray) -> tuple[int, int, int]:
    """Count tumours and those that touch no liver voxel; all 26 neighbours count as touching.

    Memory: 4 bytes for each voxel of the box around the tumours.

    Returns:
        Tumours, detached tumours, voxels of the detached tumours.
    """
    box = _find_tumour_box(label_zyx)
    if box is None:
        return 0, 0, 0
    cropped = label_zyx[box]
    is_tumour = cropped == TUMOUR
    # Only the box is labelled: components of the whole scan would need 4 bytes for each voxel.
    components = cc3d.connected_components(is_tumour.view(np.uint8), connectivity=26)
    count = int(components.max())
    is_detached = np.ones(count + 1, dtype=bool)
    is_detached[np.unique(components[_dilate_mask(cropped == LIVER) & is_tumour])] = False
    # Component 0 is everything that is not tumour.
    is_detached[0] = False
    detached_voxels = int(np.count_nonzero(is_detached[components]))
    return count, int(np.count_nonzero(is_detached)), detached_voxels


def _find_tumour_box(label_zyx: np.ndarray) -> tuple[slice, ...] | None:
    """The box around all tumours with a margin of one voxel; None without tumour."""
    in_plane = np.zeros(label_zyx.shape[1:], dtype=bool)
    planes = []
    # By slice: no boolean copy of a large scan.
    for z, slice_yx in enumerate(label_zyx):
        is_tumour = slice_yx == TUMOUR
        if is_tumour.any():
            planes.append(z)
            in_plane |= is_tumour
    if not planes:
        return None
    rows = np.flatnonzero(in_plane.any(axis=1))
    columns = np.flatnonzero(in_plane.any(axis=0))
    box = []
    for indices in (planes, rows, columns):
        box.append(slice(max(0, int(indices[0]) - 1), int(indices[-1]) + 2))
    return tuple(box)


def _dilate_mask(mask_zyx: np.ndarray) -> np.ndarray:
    """The mask and its 26 neighbours."""
    # One voxel along each axis in turn gives the 3 x 3 x 3 cube.
    for axis in range(3):
        before = np.moveaxis(mask_zyx, axis, 0)
        after = before.copy()
        after[1:] |= before[:-1]
        after[:-1] |= before[1:]
        mask_zyx = np.moveaxis(after, 0, axis)
    return mask_zyx
