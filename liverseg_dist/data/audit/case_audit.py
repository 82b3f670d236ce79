"""Audit of a case before anything is done with it: `audit_case(image, label)`.

The label is returned on the image's grid, repaired if that is safe. Each finding has a severity and
a stable code:

  error    the case is excluded    hu_offset_missing not_ct_like constant_image
                                   too_many_broken_voxels label_values label_fractional
                                   label_no_overlap label_empty label_missing (by setting)
                                   very_few_slices (below convert.cleaning.min_slices)
  warning  should be looked at     identity_affine implausible_voxel_size very_few_slices
                                   liver_hu_implausible liver_volume liver_on_the_left
                                   tumour_outside_liver structures_overlap not_annotated
                                   label_reoriented label_resampled
                                   label_shifted label_cut label_header_lost broken_voxels
                                   padding_values blank_slices looks_like_ct
                                   (and the reader's notes)
  info     needs no action         few_slices no_tumour structures_absent ignored_voxels oblique
                                   label_missing (a scan kept without label)

Codes with the name of a structure (liver, tumour) exist for each structure (`label_checks`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from liverseg_dist.config import CT_CHANNEL, ChannelConfig, CleaningConfig
from liverseg_dist.data.audit.image_audit import (
    check_grid,
    check_intensity,
    check_invalid_voxels,
    collect_image_facts,
)
from liverseg_dist.data.audit.label_checks import (
    check_label,
    check_side,
)
from liverseg_dist.data.audit.label_geometry import match_label
from liverseg_dist.data.findings import Finding
from liverseg_dist.data.label_mapping import LITS_MAPPING, LabelMapping
from liverseg_dist.volume import Volume

Status = Literal["kept", "repaired", "imputed", "unlabelled", "excluded"]

LABEL_TOLERANCE = 1e-3
MAX_SHOWN_VALUES = 5
REPAIR_CODES = frozenset(
    {"label_reoriented", "label_resampled", "label_shifted", "label_header_lost"}
)


@dataclass(frozen=True)
class AuditResult:
    """Status, repaired label and findings of a case."""

    status: Status
    label: Volume | None
    """Class values on the image's grid, uint8. None without a usable label."""
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
    mapping: LabelMapping = LITS_MAPPING,
    annotated: Sequence[str] | None = None,
    label_name: str = "",
    channel: ChannelConfig = CT_CHANNEL,
) -> AuditResult:
    """Audit one case.

    Args:
        image: The first channel of the scan: HU for CT, else arbitrary units; in any orientation.
        label: Values of the source, on any grid. None if the case has no label file.
        cleaning: Limits, and what to do without a label.
        notes: Findings of the reader about the files.
        training: Whether the case should have a label.
        mapping: From the label's values to class values.
        annotated: Structures that were annotated in the case; None: those of the mapping.
        label_name: The label's file, for messages.
        channel: The channel of `image`.
    """
    findings = list(notes)
    facts = collect_image_facts(image)
    findings += check_grid(image, cleaning)
    findings += check_invalid_voxels(image, cleaning, facts, channel)
    # Image and label are judged independently: a bad label must not hide a bad image.
    repaired: Volume | None = None
    if label is not None:
        integer_label, problem = _convert_label_values(label, mapping, label_name)
        if problem is not None:
            findings.append(problem)
        else:
            match = match_label(image.grid, integer_label)
            findings += match.findings
            repaired = match.label
    if repaired is not None:
        named = mapping.annotated if annotated is None else annotated
        findings += check_label(repaired, mapping.scheme, named, facts)
        findings += check_side(image, repaired, facts, channel, mapping.scheme)
    findings += check_intensity(image, repaired, facts, channel, mapping.scheme)
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


def _convert_label_values(
    label: Volume, mapping: LabelMapping, label_name: str
) -> tuple[Volume, Finding | None]:
    """The label in class values, or the unchanged label and a finding about its values."""
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
    unexpected = [value for value in counts if not mapping.knows(value)]
    if unexpected:
        shown = ", ".join(
            f"{value} ({counts[value]:,} voxels)" for value in unexpected[:MAX_SHOWN_VALUES]
        )
        message = f"label values {shown}; expected {mapping.expected}"
        # The message of data sets like LiTS is part of the bytes of their stores.
        if label_name and not mapping.is_lits:
            message = f"{label_name}: {message}"
        return label, Finding("error", "label_values", message)
    return label.with_voxels(mapping.to_classes(voxels)), None


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
