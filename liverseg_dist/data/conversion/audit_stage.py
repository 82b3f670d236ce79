"""Stage 1 of a conversion: read a scan, audit it, and decide whether it is stored."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from liverseg_dist.data.audit.case_audit import audit_case
from liverseg_dist.data.audit.duplicates import hash_voxels
from liverseg_dist.data.audit.image_audit import audit_further_channel
from liverseg_dist.data.audit.label_geometry import has_identity_affine
from liverseg_dist.data.conversion.case_records import PATIENT_FACT, CaseJob, CaseRecord
from liverseg_dist.data.findings import Finding, ScanFileError
from liverseg_dist.data.io.channel_files import read_channel_files
from liverseg_dist.data.io.dicom_series import DicomScan
from liverseg_dist.data.io.modality import is_one_ct_channel
from liverseg_dist.data.io.nifti import ScanFile, read_scan_file
from liverseg_dist.data.io.spacing_table import replace_spacing
from liverseg_dist.data.io.structure_files import read_structure_label
from liverseg_dist.data.label_mapping import identity_mapping
from liverseg_dist.data.preprocessing.channel_overlap import check_overlap
from liverseg_dist.volume import Float3, Grid, Volume

Volumes = tuple[Volume | None, ...]
"""One for each channel of the data set; None for a channel that the scan does not have."""


@dataclass(frozen=True)
class ScanFiles:
    """The content of a scan's files, and what reading them found."""

    images: Volumes
    label: Volume | None
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class AuditedScan:
    """A scan after its audit."""

    record: CaseRecord
    """The record with status, findings, facts and voxel hash."""
    images: Volumes
    label: Volume | None
    """Repaired label on the first channel's own grid (uint8); None without label."""
    label_guide: Volume | None
    """Label by a run that only places the slab; it is not stored."""
    is_wanted: bool
    """Whether the scan is stored."""

    @property
    def reference_channel(self) -> int:
        """Number of the first channel that the scan has."""
        return _find_first(self.images)[0]

    @property
    def image(self) -> Volume:
        """The first channel that the scan has."""
        return _find_first(self.images)[1]


def read_scan(job: CaseJob) -> ScanFiles:
    """Read image and label of a scan.

    Raises:
        ScanFileError: A file cannot be read as a scan.
    """
    channel_files = read_channel_files(job.case.images, len(job.channels))
    grid = next(file.volume.grid for file in channel_files if file is not None)
    label, label_findings = _read_label(job, grid)
    findings = [*job.case.findings]
    for file, channel in zip(channel_files, job.channels, strict=True):
        if file is not None:
            findings += file.notes
            findings += _describe_stored_type(file) if channel.is_ct else []
    findings += label_findings
    images = tuple(None if file is None else file.volume for file in channel_files)
    return ScanFiles(images, label, tuple(findings))


def _read_label(job: CaseJob, grid: Grid) -> tuple[Volume | None, list[Finding]]:
    """The label of a scan from its file, or joined from one file for each structure."""
    try:
        return _read_label_files(job, grid)
    except ScanFileError as error:
        if not isinstance(job.case.image, DicomScan):
            raise
        # Paths of DICOM cases may contain the name of the patient.
        raise ScanFileError(job.case.label_name, error.code, error.reason) from None


def _read_label_files(job: CaseJob, grid: Grid) -> tuple[Volume | None, list[Finding]]:
    if job.case.label is not None:
        file = read_scan_file(job.case.label, "label")
        return file.volume, list(file.notes)
    if job.case.structure_files:
        return read_structure_label(job.case.structure_files, job.mapping, grid)
    return None, []


def audit_scan(job: CaseJob, scan: ScanFiles, record: CaseRecord) -> AuditedScan:
    """Audit a scan and decide whether it is stored.

    Args:
        job: The scan and the settings of the conversion.
        scan: Content of the scan's files.
        record: The record of the scan with its id and hashes.

    Returns:
        The scan with its repaired label and the completed record.
    """
    cleaning = job.convert.cleaning
    images, label = _apply_true_spacing(scan.images, scan.label, job.true_spacing_mm)
    number, image = _find_first(images)
    audit = audit_case(
        image,
        label,
        cleaning,
        scan.findings,
        training=job.training,
        channel=job.channels[number],
        mapping=job.label_mapping,
        annotated=job.annotated,
        label_name=job.case.label_name,
    )
    facts, status = dict(audit.facts), audit.status
    if job.case.patient:
        facts[PATIENT_FACT] = job.case.patient
    findings = list(audit.findings)
    if not is_one_ct_channel(job.channels):
        facts["channels"], further = _audit_channels(job, images)
        findings += further
        if any(finding.severity == "error" for finding in further):
            status = "excluded"
    record = replace(
        record,
        status=status,
        facts=facts,
        findings=tuple(findings),
        voxel_sha256=hash_voxels(image),
    )
    # Excluded scans keep a record and a picture, so that the audit page can show the reason.
    is_wanted = status in ("kept", "repaired")
    if status == "unlabelled":
        is_wanted = cleaning.missing_label != "exclude"
    # Imputed labels are for training only, so a scan of the test set must not receive one.
    if cleaning.missing_label == "impute" and not job.training:
        is_wanted = False
    return AuditedScan(record, images, audit.label, label_guide=None, is_wanted=is_wanted)


def _find_first(images: Volumes) -> tuple[int, Volume]:
    """Number and voxels of the first channel that a scan has."""
    for number, image in enumerate(images):
        if image is not None:
            return number, image
    raise ValueError("a scan without any channel")


def _audit_channels(job: CaseJob, images: Volumes) -> tuple[list[dict[str, object]], list[Finding]]:
    """Facts of all channels, and findings about those after the first."""
    first_number, first = _find_first(images)
    facts: list[dict[str, object]] = []
    findings: list[Finding] = []
    for number, (channel, image) in enumerate(zip(job.channels, images, strict=True)):
        entry: dict[str, object] = {"name": channel.name, "modality": channel.modality}
        entry["present"] = image is not None
        facts.append(entry)
        if image is None or number == first_number:
            continue
        found, image_facts = audit_further_channel(image, job.convert.cleaning, channel)
        first_name = job.channels[first_number].name
        overlap, overlap_findings = check_overlap(first.grid, image.grid, first_name, channel.name)
        entry |= {**image_facts, "overlap": round(overlap, 4)}
        findings += [*found, *overlap_findings]
    return facts, findings


def label_with_run(job: CaseJob, audited: AuditedScan) -> AuditedScan:
    """Apply the run `convert.labels_from` to a scan without label.

    With missing_label=impute the scan receives the run's label; with missing_label=unlabelled the
    label only places the slab. Other scans are returned unchanged, except for a finding that says
    why a scan without label is not stored.
    """
    if audited.record.status != "unlabelled":
        return audited
    if audited.is_wanted and job.labeller is not None and not job.audit_only:
        run_label = Volume(job.labeller(audited.image), audited.image.grid)
        audited = _add_findings(audited, job.labeller.compare_scan(audited.image))
        if job.convert.cleaning.missing_label == "impute":
            audited = _impute_label(job, audited, run_label)
        else:
            audited = replace(audited, label_guide=run_label)
    if audited.record.status == "unlabelled" and not audited.is_wanted:
        message = (
            "no label by design; not stored (convert.cleaning.missing_label=unlabelled stores it)"
        )
        audited = _add_findings(audited, [Finding("info", "not_stored", message)])
    return audited


def _impute_label(job: CaseJob, audited: AuditedScan, label: Volume) -> AuditedScan:
    """The scan with the label of a run; excluded when the audit rejects the label."""
    number, image = _find_first(audited.images)
    # The run labels in class values; the source may have other values.
    audit = audit_case(
        image,
        label,
        job.convert.cleaning,
        channel=job.channels[number],
        mapping=identity_mapping(job.labels),
    )
    # Findings of the second audit replace those of the first that have the same code.
    renewed_codes = {finding.code for finding in audit.findings}
    earlier = [f for f in audited.record.findings if f.code not in renewed_codes]
    if audit.status == "excluded":
        status, final_label = "excluded", None
        note = Finding(
            "error",
            "label_not_imputed",
            "the run convert.labels_from gave it no usable label; left out",
        )
    else:
        status, final_label = "imputed", audit.label
        note = Finding(
            "warning",
            "label_imputed",
            "labelled by the run convert.labels_from; for training only",
        )
    record = replace(
        audited.record,
        status=status,
        facts={**audited.record.facts, **audit.facts},
        findings=(*earlier, *audit.findings, note),
    )
    return replace(audited, record=record, label=final_label, is_wanted=status == "imputed")


def _add_findings(audited: AuditedScan, findings: Sequence[Finding]) -> AuditedScan:
    record = replace(audited.record, findings=(*audited.record.findings, *findings))
    return replace(audited, record=record)


def _describe_stored_type(file: ScanFile) -> list[Finding]:
    """A finding for voxels that the file does not store as int16, the type of the store."""
    if file.stored_type in ("", "int16"):
        return []
    if file.volume.voxels.dtype == np.int16:
        message = f"{file.stored_type} in the file, all whole HU: kept exactly, as int16"
    else:
        message = f"{file.stored_type} in the file, with fractions: rounded to whole HU"
    return [Finding("info", "stored_type", message)]


def _apply_true_spacing(
    images: Volumes, label: Volume | None, spacing_mm: Float3 | None
) -> tuple[Volumes, Volume | None]:
    """Replace the voxel size of headers that lost it (`convert.cleaning.spacing_table`)."""
    if spacing_mm is None:
        return images, label
    _, first = _find_first(images)
    # A label with a geometry of its own is not affected by the image's lost header.
    if label is not None and (has_identity_affine(label.grid) or label.grid.matches(first.grid)):
        label = Volume(label.voxels, replace_spacing(label.grid, spacing_mm))
    corrected: list[Volume | None] = []
    for image in images:
        # A channel with a geometry of its own is not affected either.
        if image is not None and image.grid.matches(first.grid):
            image = Volume(image.voxels, replace_spacing(image.grid, spacing_mm))
        corrected.append(image)
    return tuple(corrected), label
