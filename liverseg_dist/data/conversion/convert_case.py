"""One scan from its files to the store: audit, clean, slab, resample, write, remember. Runs in a worker process.

Its files are read once. Nothing depends on other scans, so that a scan's bytes are the same whoever converts it and
in whatever company: what needs all scans (clip, normalisation, splits, duplicates) goes into the root, from records.
"""

import io
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from liverseg_dist.data.audit.case_audit import AuditResult, audit_case
from liverseg_dist.data.audit.duplicates import hash_voxels
from liverseg_dist.data.audit.label_geometry import has_identity_affine
from liverseg_dist.data.conversion.case_records import (
    CaseJob,
    CaseRecord,
    is_up_to_date,
    read_record,
    remove_outputs,
    source_hash,
    thumbnail_file,
    write_record,
)
from liverseg_dist.data.conversion.case_writer import (
    PRIVATE,
    CaseArrays,
    StagingDir,
    write_bytes,
    write_case,
)
from liverseg_dist.data.conversion.foreground_samples import foreground_samples
from liverseg_dist.data.conversion.store_locks import StoreLocks
from liverseg_dist.data.conversion.thumbnail import render_thumbnail
from liverseg_dist.data.findings import Finding, ScanFileError
from liverseg_dist.data.io.nifti import ScanFile, read_scan_file
from liverseg_dist.data.io.spacing_table import replace_spacing
from liverseg_dist.data.preprocessing.intensity_statistics import HuHistogram
from liverseg_dist.data.preprocessing.pipeline import clean_scan, interpolation_for
from liverseg_dist.data.preprocessing.resample import resample_to_grid
from liverseg_dist.data.preprocessing.slab import (
    Slab,
    describe_slabs,
    padded_label,
    place_slabs,
    slab_coverage,
)
from liverseg_dist.data.store.layout import CASES
from liverseg_dist.labels import IGNORE, LIVER, TUMOUR
from liverseg_dist.locks import hold_lock
from liverseg_dist.volume import CANONICAL_ORIENTATION, Float3, Grid, Volume


def convert_case(job: CaseJob) -> tuple[CaseRecord, bool]:
    """Convert one scan unless it is there already; (record, whether it was made now).

    Whatever is wrong with the scan goes into the record. Raises OSError when the store cannot be written.
    """
    if job.audit_only:
        return _made(job, source_hash(job.case)), True
    case_id = job.case.case_id
    aside = StagingDir(job.store, case_id)
    with hold_lock(StoreLocks(job.store / PRIVATE).case(case_id)) as alone:
        if alone:
            aside.clear()  # what a killed process left
        source = source_hash(job.case)
        before = read_record(job.store, case_id)
        if before is not None and is_up_to_date(before, job, source):
            return before, False
        remove_outputs(job.store, case_id)
        try:
            record = _made(job, source)
        except OSError as error:  # say where, which a failed write does not
            raise OSError(error.errno, error.strerror, error.filename or str(job.store)) from None
        for stale in (before.slabs.keys() if before is not None else set()) - record.slabs.keys():
            shutil.rmtree(job.store / CASES / stale, ignore_errors=True)
        write_record(job.store, record)
        if alone:
            aside.clear()
        return record, True


def _made(job: CaseJob, source_sha256: str) -> CaseRecord:
    record = CaseRecord(
        job.case.case_id, job.training, source_sha256, job.settings_sha256, "quarantined", []
    )
    notes = list(job.case.findings)
    try:
        image_file = read_scan_file(job.case.image, "image")
        label_file = None if job.case.label is None else read_scan_file(job.case.label, "label")
    except ScanFileError as error:
        record.findings = _json([*notes, error.to_finding()])
        return record
    notes += [
        *image_file.notes,
        *_storage_notes(image_file),
        *(label_file.notes if label_file is not None else ()),
    ]
    try:
        _judge_and_store(
            job, record, image_file.volume, None if label_file is None else label_file.volume, notes
        )
    except OSError:  # a full or read-only disk is no fault of the scan
        raise
    except (
        Exception
    ) as error:  # whatever one scan does to us, the others go on; the exit code tells
        record.status, record.slabs, record.final = (
            "quarantined",
            {},
            not isinstance(error, MemoryError),
        )
        reason = f"conversion failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        record.findings += _json([Finding("error", "failed", reason)])
    return record


def _storage_notes(file: ScanFile) -> list[Finding]:
    """What became of voxels that are not stored as the int16 we keep."""
    if file.stored_type in ("", "int16"):
        return []
    if file.volume.voxels.dtype == np.int16:
        return [
            Finding(
                "info",
                "stored_type",
                f"{file.stored_type} in the file, all whole HU: kept exactly, as int16",
            )
        ]
    return [
        Finding(
            "info",
            "stored_type",
            f"{file.stored_type} in the file, with fractions: rounded to whole HU",
        )
    ]


def _judge_and_store(
    job: CaseJob, record: CaseRecord, image: Volume, label: Volume | None, notes: Sequence[Finding]
) -> None:
    image, label = _true_spacing(image, label, job.true_spacing_mm)
    audit = audit_case(image, label, job.convert.cleaning, notes, training=job.training)
    record.status, record.facts = audit.status, audit.facts
    record.findings = _json(audit.findings)
    record.voxel_sha256 = hash_voxels(image)
    policy, guide = job.convert.cleaning.missing_label, None
    wanted = audit.status in ("kept", "repaired") or (
        audit.status == "unlabelled" and policy != "exclude"
    )
    if policy == "impute" and not job.training:
        wanted = False  # a scan that was set apart is not to be trained on
    if wanted and audit.status == "unlabelled" and job.labeller is not None and not job.audit_only:
        guide = Volume(job.labeller(image), image.grid)
        unlike = job.labeller.compare_scan(image)
        audit = replace(audit, findings=(*audit.findings, *unlike))
        record.findings = _json(audit.findings)
        if policy == "impute":
            audit, guide = _imputed(job, audit, image, guide), None
            record.status, record.facts, record.findings = (
                audit.status,
                audit.facts,
                _json(audit.findings),
            )
            wanted = audit.status == "imputed"
    if audit.status == "unlabelled" and not wanted:
        message = (
            "no label by design; not stored (convert.cleaning.missing_label=unlabelled stores it)"
        )
        record.findings += _json([Finding("info", "not_stored", message)])
    if job.audit_only:
        return
    if wanted:
        _store(job, record, image, audit, guide)
    else:
        seen = image.reoriented()
        _save_thumbnail(job, seen.voxels, None, seen.spacing_mm)


def _imputed(job: CaseJob, before: AuditResult, image: Volume, label: Volume) -> AuditResult:
    """The audit of a scan with the label that a run gave it; excluded when the run found nothing that can be used."""
    audit = audit_case(image, label, job.convert.cleaning)
    said = [
        finding
        for finding in before.findings
        if finding.code not in {f.code for f in audit.findings}
    ]
    if audit.status == "excluded":
        note = Finding(
            "error",
            "label_not_imputed",
            "the run convert.labels_from gave it no usable label; left out",
        )
        return replace(audit, label=None, findings=(*said, *audit.findings, note))
    note = Finding(
        "warning", "label_imputed", "labelled by the run convert.labels_from; for training only"
    )
    return replace(audit, status="imputed", findings=(*said, *audit.findings, note))


def _true_spacing(
    image: Volume, label: Volume | None, spacing_mm: Float3 | None
) -> tuple[Volume, Volume | None]:
    if spacing_mm is None:
        return image, label
    if label is not None and (has_identity_affine(label.grid) or label.grid.matches(image.grid)):
        label = Volume(label.voxels, replace_spacing(label.grid, spacing_mm))
    return Volume(image.voxels, replace_spacing(image.grid, spacing_mm)), label


def _store(
    job: CaseJob, record: CaseRecord, image: Volume, audit: AuditResult, guide: Volume | None
) -> None:
    """`guide`: where a run sees the liver of a scan without label."""
    convert, case_id = job.convert, job.case.case_id
    clean = clean_scan(image, convert.cleaning)
    label = None if audit.label is None else _onto(audit.label, clean.volume.grid)
    shown = label
    if guide is not None and guide.voxels.any():
        shown = _onto(guide, clean.volume.grid)
        note = "the run convert.labels_from found the liver; the slab lies on it, its voxels are not stored"
        record.findings += _json([Finding("info", "liver_found", note)])
    slabs = place_slabs(clean.volume.grid, shown, convert.cleaning.spacing_mm, convert.slab)
    imputed = audit.status == "imputed"
    if label is not None and not imputed:  # intensities are learnt from what people labelled
        liver = (label.voxels == LIVER) | (label.voxels == TUMOUR)
        record.histogram = HuHistogram.of(clean.volume.voxels[liver]).to_json()
        del liver
    stored_labels = []
    for number, slab in enumerate(slabs):
        arrays = _cut(job, image.grid, clean.volume, label, slab)
        arrays.attributes.update(
            parent=case_id, cleaning=clean.provenance, source_sha256=record.source_sha256
        )
        if imputed and job.labeller is not None:
            arrays.attributes["imputed_by"] = job.labeller.fingerprint
        if audit.label is not None:
            arrays = replace(arrays, source_label=np.ascontiguousarray(audit.label.voxels))
        name = case_id if len(slabs) == 1 else f"{case_id}_tile{number}"
        files = write_case(StagingDir(job.store, case_id), name, arrays)
        record.slabs[name] = {**arrays.attributes, "files": files}
        stored_labels.append(arrays.label)
        if number == len(slabs) // 2:
            _save_thumbnail(
                job, arrays.image, None if label is None else arrays.label, slab.grid.spacing_mm
            )
    if label is not None:
        record.facts["coverage"] = slab_coverage(label, slabs, stored_labels)
    record.findings += _json(describe_slabs(clean.volume.grid, slabs, record.facts.get("coverage")))


def _onto(label: Volume, grid: Grid) -> Volume:
    """`label`, turned to RAS, on `grid`: its own grid or a crop of it (`convert.cleaning.body_margin_mm`)."""
    label = label.reoriented(CANONICAL_ORIENTATION)
    start = np.rint(label.grid.index_of(grid.world_mm(np.zeros(3)))).astype(int)
    return label.cropped(start.tolist(), grid.shape)


def _cut(
    job: CaseJob, source_grid: Grid, clean: Volume, label: Volume | None, slab: Slab
) -> CaseArrays:
    image = resample_to_grid(
        clean, slab.grid, "image", interpolation=interpolation_for(job.convert.cleaning)
    ).voxels
    if label is None:
        stored = np.full(slab.grid.shape, IGNORE, np.uint8)
    else:
        stored = padded_label(resample_to_grid(label, slab.grid, "label").voxels, slab)
    foreground, tumours = foreground_samples(stored, job.convert.foreground_samples)
    counts = np.bincount(stored.ravel(), minlength=256)[:3]
    attributes: dict[str, Any] = {
        "labelled": label is not None,
        "grid": slab.grid.to_json(),
        "source_grid": source_grid.to_json(),
        "valid_slices": list(slab.valid_slices),
        "class_voxels": counts.tolist(),
        "tumours": tumours,
        "slab": {"policy": job.convert.slab.policy, "spacing_mm": list(slab.grid.spacing_mm)},
    }
    image, stored = np.ascontiguousarray(image), np.ascontiguousarray(stored)
    return CaseArrays(image, stored, None, foreground, slab.grid, attributes)


def _save_thumbnail(
    job: CaseJob, image_zyx: np.ndarray, label_zyx: np.ndarray | None, spacing_mm: Float3
) -> None:
    buffer = io.BytesIO()
    render_thumbnail(image_zyx, label_zyx, spacing_mm).save(buffer, "png")
    write_bytes(
        StagingDir(job.store, job.case.case_id),
        thumbnail_file(job.store, job.case.case_id),
        buffer.getvalue(),
    )


def _json(findings: Sequence[Finding]) -> list[dict[str, str]]:
    return [finding.to_json() for finding in findings]
