"""What conversion remembers of each scan between runs, and how it tells that a scan need not be converted again."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from liverseg_dist.config import ConvertConfig
from liverseg_dist.data.audit.findings import Finding
from liverseg_dist.data.conversion.case_writer import (
    PRIVATE,
    SUMS,
    StagingDir,
    json_text,
    write_text,
)
from liverseg_dist.data.conversion.settings_match import DONE_BEFORE
from liverseg_dist.data.conversion.store_locks import StoreLocks
from liverseg_dist.data.io.dataset_index import MsdCase
from liverseg_dist.data.store.layout import CASES, SCHEMA
from liverseg_dist.files import file_sha256
from liverseg_dist.locks import hold_lock
from liverseg_dist.volume import Float3, Volume

RECORD_SCHEMA = 2
PROCESSING = 1
"""Raise it when the same settings come to make other voxels: every case is then converted again."""
NO_CONCERN_OF_A_CASE = {
    "outliers",
    "percentiles",
    "window_hu",
    "robust_z",
    "standardise",
    "spacing_table",
}
"""Cleaning settings that only the root depends on (clip and normalisation), or that reach a case by their content."""


class Labeller(Protocol):
    """Labels a scan that has no label. Crosses process borders."""

    @property
    def fingerprint(self) -> str:
        """Of everything its answers depend on."""

    def __call__(self, image: Volume) -> np.ndarray:
        """Labels (uint8, z, y, x) on the image's own grid, for HU in any orientation."""

    def compare_scan(self, image: Volume) -> list[Finding]:
        """Warnings about a scan that is unlike those the labels were learnt from."""


@dataclass
class CaseRecord:
    """A scan, stored or not. JSON in `.liverseg/records/`; no path, no name of a person."""

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
    final: bool = True
    """False: what went wrong may go right next time (memory ran out), so that the next run tries again."""
    schema: int = RECORD_SCHEMA


@dataclass(frozen=True)
class CaseJob:
    """All a worker needs to know."""

    case: MsdCase
    training: bool
    store: Path
    convert: ConvertConfig
    true_spacing_mm: Float3 | None = None
    audit_only: bool = False
    labeller: Labeller | None = None

    @property
    def settings_sha256(self) -> str:
        """Of everything but the files' bytes that the stored case depends on."""
        cleaning = self.convert.cleaning.model_dump(mode="json", exclude=NO_CONCERN_OF_A_CASE)
        if self.convert.cleaning.min_slices == DONE_BEFORE["convert.cleaning.min_slices"]:
            cleaning.pop("min_slices")
        labels_from = None if self.labeller is None else self.labeller.fingerprint
        if self.case.label is not None:
            cleaning.pop("missing_label")
            labels_from = None
        what = {
            "versions": [SCHEMA, RECORD_SCHEMA, PROCESSING],
            "cleaning": cleaning,
            "slab": self.convert.slab.model_dump(mode="json"),
            "foreground_samples": self.convert.foreground_samples,
            "true_spacing_mm": self.true_spacing_mm,
            "training": self.training,
            "notes": [finding.to_json() for finding in self.case.findings],
            **({"labels_from": labels_from} if labels_from is not None else {}),
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def record_file(store: Path, case_id: str) -> Path:
    return store / PRIVATE / "records" / f"{case_id}.json"


def thumbnail_file(store: Path, case_id: str) -> Path:
    return store / PRIVATE / "thumbnails" / f"{case_id}.png"


def read_record(store: Path, case_id: str) -> CaseRecord | None:
    """None when there is none, a damaged one, or none this version understands."""
    try:
        content = json.loads(record_file(store, case_id).read_text(encoding="utf-8"))
        if content.pop("sha256") != _checksum(content) or content["schema"] != RECORD_SCHEMA:
            return None
        return CaseRecord(**content)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None


def write_record(store: Path, record: CaseRecord) -> None:
    content = _finite(asdict(record))
    text = json_text({**content, "sha256": _checksum(content)})
    write_text(StagingDir(store, record.case_id), record_file(store, record.case_id), text)


def _checksum(content: dict[str, Any]) -> str:
    """The root is made from records alone: one that is damaged must not be believed."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def remove_outputs(store: Path, case_id: str) -> None:
    """Before a case changes: the root, which speaks of it as it was, and its record go. Nobody takes old for new."""
    with hold_lock(StoreLocks(store / PRIVATE).root):
        for path in (
            store / "zarr.json",
            store / SUMS,
            record_file(store, case_id),
            thumbnail_file(store, case_id),
        ):
            path.unlink(missing_ok=True)


def is_up_to_date(record: CaseRecord, job: CaseJob, source_sha256: str) -> bool:
    """Made from these bytes with these settings, and its files are what was written (a disk, or a crash, may have
    changed them since). Reads the stored case, which is less than its source."""
    if not record.final or (record.source_sha256, record.settings_sha256) != (
        source_sha256,
        job.settings_sha256,
    ):
        return False
    seen = not record.voxel_sha256 or thumbnail_file(job.store, record.case_id).is_file()
    return seen and all(
        _has(job.store / CASES / name / file, sha256)
        for name, slab in record.slabs.items()
        for file, sha256 in slab["files"].items()
    )


def _has(file: Path, sha256: str) -> bool:
    try:
        return file_sha256(file) == sha256
    except OSError:
        return False


def source_hash(case: MsdCase) -> str:
    """Of the bytes of image and label; an unreadable file counts by its absence."""
    parts = []
    for path in (case.image, case.label):
        try:
            parts.append("none" if path is None else file_sha256(path))
        except OSError:
            parts.append("unreadable")
    return ":".join(parts)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value
