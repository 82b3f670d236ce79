"""The record of each scan: what conversion keeps between two runs.

A record decides whether a scan must be converted again, and the root of the store is made from the
records alone. Each record carries a checksum, because a damaged record would damage the root.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from liverseg_dist.config import CT_CHANNELS, ChannelConfig, ConvertConfig
from liverseg_dist.data.conversion.case_writer import (
    StagingDir,
    format_json,
    write_text,
)
from liverseg_dist.data.conversion.settings_match import EARLIER_DEFAULTS, slab_settings
from liverseg_dist.data.conversion.store_locks import StoreLocks
from liverseg_dist.data.conversion.stored_case import StoredCase
from liverseg_dist.data.findings import Finding, ScanFileError
from liverseg_dist.data.io import scan_reader
from liverseg_dist.data.io.dataset_index import DatasetCase
from liverseg_dist.data.label_mapping import LITS_MAPPING, LabelMapping, identity_mapping
from liverseg_dist.data.store.layout import CASES, CHECKSUM_FILE, PRIVATE_DIR, SCHEMA
from liverseg_dist.files import file_sha256
from liverseg_dist.labels import LabelScheme
from liverseg_dist.locks import hold_lock
from liverseg_dist.volume import Float3, Volume

RECORD_SCHEMA = 2
PROCESSING_VERSION = 1
"""Increase it when the same settings produce other voxels: every case is then converted again."""
ROOT_ONLY_SETTINGS = {
    "outliers",
    "percentiles",
    "window_hu",
    "robust_z",
    "standardise",
    "spacing_table",
}
"""Cleaning settings that do not change a stored case: clip and normalisation belong to the root,
and the spacing table reaches a case as its own entry (`CaseJob.true_spacing_mm`)."""


class Labeller(Protocol):
    """Labels scans that have no label. Must be picklable: it is sent to worker processes."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the labels depend on."""

    @property
    def labels(self) -> LabelScheme:
        """Scheme of its labels."""

    def __call__(self, image: Volume) -> np.ndarray:
        """Label (uint8, z, y, x) on the image's own grid, for HU in any orientation."""

    def compare_scan(self, image: Volume) -> list[Finding]:
        """Warnings about a scan that differs from the scans the labeller was trained on."""


PATIENT_FACT = "patient"
"""Key in `CaseRecord.facts`: pseudonym of the patient, where the source states one."""


@dataclass(frozen=True)
class CaseRecord:
    """The result of one scan, stored or not.

    JSON in `.liverseg/records/`. Contains no path and no name of a person.
    """

    case_id: str
    training: bool
    source_sha256: str
    settings_sha256: str
    status: str
    findings: tuple[Finding, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Facts of the audit (shape, spacing, ...), and the slabs' `coverage`."""
    voxel_sha256: str = ""
    histogram: Mapping[str, Any] = field(default_factory=dict)
    """Liver voxels in HU at the scan's own resolution (`channel_histograms`); empty without label.

    The JSON form holds the used range only: 10,000 full histograms would take 5 GB.
    """
    slabs: Mapping[str, StoredCase] = field(default_factory=dict)
    """Stored cases of the scan by their case id."""
    final: bool = True
    """False: the failure may be temporary (out of memory); the next run converts the scan again."""
    schema: int = RECORD_SCHEMA

    def to_json(self) -> dict[str, Any]:
        """JSON with the fields in their order; the checksum is added by `write_record`."""
        slabs = {case_id: stored.to_json() for case_id, stored in self.slabs.items()}
        return {
            "case_id": self.case_id,
            "training": self.training,
            "source_sha256": self.source_sha256,
            "settings_sha256": self.settings_sha256,
            "status": self.status,
            "findings": [finding.to_json() for finding in self.findings],
            "facts": dict(self.facts),
            "voxel_sha256": self.voxel_sha256,
            "histogram": dict(self.histogram),
            "slabs": slabs,
            "final": self.final,
            "schema": self.schema,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "CaseRecord":
        """Inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: A field is missing, unknown or has
                another type.
        """
        findings = tuple(Finding(**finding) for finding in data["findings"])
        slabs = {name: StoredCase.from_json(slab) for name, slab in data["slabs"].items()}
        return cls(**{**data, "findings": findings, "slabs": slabs})


@dataclass(frozen=True)
class CaseJob:
    """Everything that a worker process needs to convert one scan."""

    case: DatasetCase
    training: bool
    store: Path
    convert: ConvertConfig
    true_spacing_mm: Float3 | None = None
    """Voxel size (z, y, x) that replaces the one in the scan's header."""
    audit_only: bool = False
    labeller: Labeller | None = None
    mapping: LabelMapping = LITS_MAPPING
    """From the label values of the case's source to class values."""
    annotated: tuple[str, ...] | None = None
    """Structures that were annotated in the case; None: all of the scheme."""
    channels: tuple[ChannelConfig, ...] = CT_CHANNELS

    @property
    def labels(self) -> LabelScheme:
        """Scheme of the stored labels."""
        return self.mapping.scheme

    @property
    def label_mapping(self) -> LabelMapping:
        """From the values of the label as it was read to class values."""
        # Files of single structures are joined in class values.
        return identity_mapping(self.labels) if self.mapping.class_of_file else self.mapping

    @property
    def settings_sha256(self) -> str:
        """Hash of all inputs of the stored case except the bytes of the source files."""
        cleaning = self.convert.cleaning.model_dump(
            mode="json", by_alias=True, exclude=ROOT_ONLY_SETTINGS
        )
        # Left out with its earlier value: cases of older stores need not be converted again.
        if self.convert.cleaning.min_slices == EARLIER_DEFAULTS["convert.cleaning.min_slices"]:
            cleaning.pop("min_slices")
        labels_from = None if self.labeller is None else self.labeller.fingerprint
        # A labelled scan does not depend on how scans without label are handled.
        if self.case.has_label:
            cleaning.pop("missing_label")
            labels_from = None
        inputs = {
            "versions": [SCHEMA, RECORD_SCHEMA, PROCESSING_VERSION],
            "cleaning": cleaning,
            "slab": slab_settings(self.convert),
            "foreground_samples": self.convert.foreground_samples,
            "true_spacing_mm": self.true_spacing_mm,
            "training": self.training,
            "notes": [finding.to_json() for finding in self.case.findings],
        }
        # Left out for one channel of CT: such cases have the hash that they had before.
        if self.channels != CT_CHANNELS:
            inputs["channels"] = [channel.model_dump() for channel in self.channels]
            inputs["register_channels"] = self.convert.register_channels
        # Left out for the labels of LiTS, for the same reason.
        if not self.mapping.is_lits or self.mapping.class_of_file or self.annotated is not None:
            inputs["labels"] = self.mapping.to_json()
            inputs["annotated"] = self.annotated
        if labels_from is not None:
            inputs["labels_from"] = labels_from
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def record_file(store: Path, case_id: str) -> Path:
    """Path of a scan's record."""
    return store / PRIVATE_DIR / "records" / f"{case_id}.json"


def thumbnail_file(store: Path, case_id: str) -> Path:
    """Path of a scan's picture for the audit page."""
    return store / PRIVATE_DIR / "thumbnails" / f"{case_id}.png"


def read_record(store: Path, case_id: str) -> CaseRecord | None:
    """The record of a scan; None when it is missing, damaged or of another schema."""
    try:
        content = json.loads(record_file(store, case_id).read_text(encoding="utf-8"))
        checksum = content.pop("sha256")
        if checksum != _hash_content(content) or content["schema"] != RECORD_SCHEMA:
            return None
        # The checksum is correct, but another version may have written other fields.
        return CaseRecord.from_json(content)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None


def write_record(store: Path, record: CaseRecord) -> None:
    """Write the record of a scan in one step, with its checksum."""
    content = _replace_nonfinite(record.to_json())
    text = format_json({**content, "sha256": _hash_content(content)})
    write_text(StagingDir(store, record.case_id), record_file(store, record.case_id), text)


def _hash_content(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def remove_outputs(store: Path, case_id: str) -> None:
    """Remove the root of the store and the record and picture of a scan, before the scan changes.

    The root describes the scan in its old state. Without root, no reader can open a store whose
    metadata and voxels differ.
    """
    outputs = (
        store / "zarr.json",
        store / CHECKSUM_FILE,
        record_file(store, case_id),
        thumbnail_file(store, case_id),
    )
    # Another process may be writing the root from the records at this moment.
    with hold_lock(StoreLocks(store / PRIVATE_DIR).root):
        for path in outputs:
            path.unlink(missing_ok=True)


def is_up_to_date(record: CaseRecord, job: CaseJob, source_sha256: str) -> bool:
    """Whether the scan need not be converted again.

    True when the record was made from the same bytes with the same settings, and each stored file
    still has its checksum (a crash or a disk error may have changed it). Reads the stored files,
    which are smaller than the source.
    """
    if not record.final or record.source_sha256 != source_sha256:
        return False
    if record.settings_sha256 != job.settings_sha256:
        return False
    # Only scans that could be read have a voxel hash, and only these have a picture.
    if record.voxel_sha256 and not thumbnail_file(job.store, record.case_id).is_file():
        return False
    for case_id, stored in record.slabs.items():
        for name, sha256 in stored.files.items():
            if not _has_checksum(job.store / CASES / case_id / name, sha256):
                return False
    return True


def _has_checksum(file: Path, sha256: str) -> bool:
    try:
        return file_sha256(file) == sha256
    except OSError:
        return False


def hash_source(case: DatasetCase) -> str:
    """SHA-256 of each image and label file, joined by colons.

    A missing hash is `none` or `unreadable`.
    """
    parts = []
    for path in (*case.images, *(case.label_files or (None,))):
        try:
            parts.append("none" if path is None else scan_reader.hash_source(path))
        except (OSError, ScanFileError):
            parts.append("unreadable")
    return ":".join(parts)


def _replace_nonfinite(value: Any) -> Any:
    """The same JSON value with null for NaN and infinity, which JSON cannot represent."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _replace_nonfinite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_nonfinite(inner) for inner in value]
    return value
