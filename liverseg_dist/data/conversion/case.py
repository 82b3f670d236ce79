"""One case from its files to the store: audit, clean, slab, resample, write, remember. Runs in a worker process."""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cc3d
import numpy as np

from liverseg_dist.config import ConvertConfig
from liverseg_dist.data.audit import AuditResult, audit_case
from liverseg_dist.data.cleaning.body import body_box, body_mask
from liverseg_dist.data.cleaning.intensity import HuHistogram
from liverseg_dist.data.conversion.thumbnail import thumbnail
from liverseg_dist.data.conversion.writer import PRIVATE, CaseArrays, sha256_file, write_case, write_json
from liverseg_dist.data.duplicates import voxel_hash
from liverseg_dist.data.findings import Finding, ScanFileError
from liverseg_dist.data.label_geometry import is_identity
from liverseg_dist.data.layout import CASES
from liverseg_dist.data.msd import MsdCase
from liverseg_dist.data.nifti import read_scan_file
from liverseg_dist.data.prepare import clean_scan, interpolation_of
from liverseg_dist.data.resample import resample
from liverseg_dist.data.slab import Slab, coverage, padded_label, place_slabs
from liverseg_dist.data.spacing_table import with_true_spacing
from liverseg_dist.labels import IGNORE, LIVER, TUMOUR
from liverseg_dist.volume import CANONICAL_ORIENTATION, Float3, Volume

RECORD_SCHEMA = 1


@dataclass
class CaseRecord:
    """What conversion remembers of a scan, stored or not. JSON in `.liverseg/records/`; no path, no name of a person."""

    case_id: str
    training: bool
    source_sha256: str
    settings_sha256: str
    status: str
    findings: list[dict[str, str]]
    facts: dict[str, Any] = field(default_factory=dict)
    voxel_sha256: str = ""
    histogram: dict[str, Any] = field(default_factory=dict)
    """Of liver voxels, HU at the scan's own resolution."""
    slabs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stored case id -> its attributes, with `files`: SHA-256 by file."""
    schema: int = RECORD_SCHEMA


@dataclass(frozen=True)
class CaseJob:
    """All a worker needs to know."""

    case: MsdCase
    training: bool
    store: Path
    convert: ConvertConfig
    settings_sha256: str
    true_spacing_mm: Float3 | None = None
    audit_only: bool = False


def convert_case(job: CaseJob) -> tuple[CaseRecord, bool]:
    """Convert one scan unless it is there already; (record, whether it was made now). Never raises for a bad scan."""
    if job.audit_only:
        return _made(job, _source_hash(job.case)), True
    with _locked(job.store / PRIVATE / "locks" / job.case.case_id):
        source = _source_hash(job.case)
        before = read_record(job.store, job.case.case_id)
        if before is not None and _still_good(before, job, source):
            return before, False
        record = _made(job, source)
        if before is not None:
            for stale in before.slabs.keys() - record.slabs.keys():
                shutil.rmtree(job.store / CASES / stale, ignore_errors=True)
        write_json(record_file(job.store, job.case.case_id), asdict(record))
        return record, True


def record_file(store: Path, case_id: str) -> Path:
    return store / PRIVATE / "records" / f"{case_id}.json"


def read_record(store: Path, case_id: str) -> CaseRecord | None:
    """None when there is none, or none this version understands."""
    try:
        content = json.loads(record_file(store, case_id).read_text(encoding="utf-8"))
        return CaseRecord(**content) if content.get("schema") == RECORD_SCHEMA else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _still_good(record: CaseRecord, job: CaseJob, source_sha256: str) -> bool:
    """Made from these bytes with these settings, and its files are there (their content is `verify`'s business)."""
    if (record.source_sha256, record.settings_sha256) != (source_sha256, job.settings_sha256):
        return False
    files = (job.store / CASES / name / file for name, slab in record.slabs.items() for file in slab["files"])
    return all(file.is_file() for file in files)


def _made(job: CaseJob, source_sha256: str) -> CaseRecord:
    record = CaseRecord(job.case.case_id, job.training, source_sha256, job.settings_sha256, "quarantined", [])
    try:
        image_file = read_scan_file(job.case.image, "image")
        image, notes = image_file.volume, [*job.case.findings, *image_file.notes]
        label = None
        if job.case.label is not None:
            label_file = read_scan_file(job.case.label, "label")
            label, notes = label_file.volume, [*notes, *label_file.notes]
    except ScanFileError as error:
        record.findings = [f.to_json() for f in (*job.case.findings, error.finding())]
        return record
    image, label = _true_spacing(image, label, job.true_spacing_mm)
    audit = audit_case(image, label, job.convert.cleaning, notes, training=job.training)
    record.status, record.facts = audit.status, audit.facts
    record.findings = [finding.to_json() for finding in audit.findings]
    record.voxel_sha256 = voxel_hash(image)
    wanted = audit.status in ("kept", "repaired") or (
        audit.status == "unlabelled" and job.convert.cleaning.missing_label == "unlabelled"
    )
    if audit.status == "unlabelled" and not wanted:
        record.findings.append(
            Finding("info", "not_stored", "no label by design; not stored (missing_label=unlabelled stores it)").to_json()
        )
    if wanted and not job.audit_only:
        try:
            _store(job, record, image, audit)
        except OSError:  # a full or read-only disk is no fault of the case
            raise
        except Exception as error:  # whatever one case does to us, the others go on; the exit code tells
            record.status, record.slabs = "quarantined", {}
            reason = f"cleaning failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            record.findings.append(Finding("error", "failed", reason).to_json())
    return record


def _true_spacing(image: Volume, label: Volume | None, spacing_mm: Float3 | None) -> tuple[Volume, Volume | None]:
    if spacing_mm is None:
        return image, label
    if label is not None and (is_identity(label.grid) or label.grid.matches(image.grid)):
        label = Volume(label.voxels, with_true_spacing(label.grid, spacing_mm))
    return Volume(image.voxels, with_true_spacing(image.grid, spacing_mm)), label


def _store(job: CaseJob, record: CaseRecord, image: Volume, audit: AuditResult) -> None:
    convert = job.convert
    clean = clean_scan(image, convert.cleaning)
    label = audit.label.reoriented(CANONICAL_ORIENTATION) if audit.label is not None else None
    if label is not None and label.shape != clean.volume.shape:  # cropped to the body: the label goes the same way
        box = body_box(body_mask(image.reoriented()), label.spacing_mm, convert.cleaning.body_margin_mm)
        label = label.cropped((0, box.y[0], box.x[0]), clean.volume.shape)
    slabs = place_slabs(clean.volume.grid, label, convert.cleaning.spacing_mm, convert.slab)
    if label is not None:
        liver = (label.voxels == LIVER) | (label.voxels == TUMOUR)
        record.histogram = HuHistogram.of(clean.volume.voxels[liver]).to_json()
        record.facts["coverage"] = coverage(label, slabs)
    for number, slab in enumerate(slabs):
        name = job.case.case_id if len(slabs) == 1 else f"{job.case.case_id}_tile{number}"
        arrays = _cut(job, image, clean.volume, label, slab)
        arrays.attributes.update(parent=job.case.case_id, cleaning=clean.provenance, source_sha256=record.source_sha256)
        if audit.label is not None:
            source_label = np.ascontiguousarray(audit.label.voxels)
            arrays = CaseArrays(**{**arrays.__dict__, "source_label": source_label})
        files = write_case(job.store, name, arrays)
        record.slabs[name] = {**arrays.attributes, "files": files}
        if number == 0:
            picture = job.store / PRIVATE / "thumbnails" / f"{job.case.case_id}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            thumbnail(arrays.image, arrays.label, slab.grid.spacing_mm).save(picture)


def _cut(job: CaseJob, source: Volume, clean: Volume, label: Volume | None, slab: Slab) -> CaseArrays:
    image = resample(clean, slab.grid, "image", interpolation=interpolation_of(job.convert.cleaning)).voxels
    if label is None:
        stored = np.full(slab.grid.shape, IGNORE, np.uint8)
    else:
        stored = padded_label(resample(label, slab.grid, "label").voxels, slab)
    foreground, tumours = foreground_samples(stored, job.convert.foreground_samples)
    counts = np.bincount(stored.ravel(), minlength=256)[:3]
    attributes: dict[str, Any] = {
        "labelled": label is not None,
        "grid": slab.grid.to_json(),
        "source_grid": source.grid.to_json(),
        "valid_slices": list(slab.valid_slices),
        "class_voxels": counts.tolist(),
        "tumours": tumours,
        "slab": {"policy": job.convert.slab.policy, "spacing_mm": list(slab.grid.spacing_mm)},
    }
    return CaseArrays(np.ascontiguousarray(image), np.ascontiguousarray(stored), None, foreground, slab.grid, attributes)


def foreground_samples(label_zyx: np.ndarray, most: int) -> tuple[np.ndarray, int]:
    """(int16 (n, 5) of class, tumour number, z, y, x; number of tumours). Evenly spread over each component's voxels.

    At most `most` per class; a tumour keeps at least 64 of its voxels (or all), so that each can be chosen alike.
    """
    components, tumours = cc3d.connected_components(
        np.ascontiguousarray(label_zyx == TUMOUR), connectivity=26, return_N=True
    )
    rows = [_rows(LIVER, 0, np.argwhere(label_zyx == LIVER), most)]
    tumour_voxels = np.argwhere(components > 0)
    owner = components[tuple(tumour_voxels.T)]
    for number in range(1, int(tumours) + 1):
        voxels = tumour_voxels[owner == number]
        share = max(64, most * len(voxels) // max(1, len(tumour_voxels)))
        rows.append(_rows(TUMOUR, number, voxels, share))
    return np.concatenate(rows).astype(np.int16), int(tumours)


def _rows(value: int, number: int, voxels: np.ndarray, most: int) -> np.ndarray:
    if len(voxels) > most:
        voxels = voxels[np.linspace(0, len(voxels) - 1, most).round().astype(int)]
    head = np.tile([value, number], (len(voxels), 1))
    return np.concatenate([head, voxels.reshape(-1, 3)], axis=1)


def _source_hash(case: MsdCase) -> str:
    """Of the bytes of image and label; an unreadable file counts by its absence."""
    parts = []
    for path in (case.image, case.label):
        try:
            parts.append("none" if path is None else sha256_file(path))
        except OSError:
            parts.append("unreadable")
    return ":".join(parts)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two conversions into one store take turns on a case. The lock goes with the process, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
