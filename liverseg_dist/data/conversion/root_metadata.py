"""What a store says of itself, made from the records of all scans: settings, fingerprint, splits, audit, checksums."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from liverseg_dist.config import ConvertConfig
from liverseg_dist.data.audit.duplicates import (
    find_duplicates,
    find_ircadb_overlaps,
    report_duplicates,
    report_ircadb_overlaps,
)
from liverseg_dist.data.conversion.case_records import CaseRecord
from liverseg_dist.data.conversion.settings_match import public_settings, settings_sha256
from liverseg_dist.data.patients import read_patients
from liverseg_dist.data.preprocessing.intensity_statistics import (
    HuHistogram,
    choose_intensity,
    intensity_fingerprint,
    pool_histograms,
)
from liverseg_dist.data.preprocessing.slab import pooled_coverage
from liverseg_dist.data.splits import Splits, make_splits
from liverseg_dist.data.store.layout import SCHEMA, TRAIN_ONLY
from liverseg_dist.errors import RunFailed, UserError
from liverseg_dist.labels import CLASS_NAMES


def root_content(
    name: str, convert: ConvertConfig, records: Sequence[CaseRecord]
) -> dict[str, Any]:
    """The root attribute: everything a reader asks before it reads voxels."""
    cases = {case_id: slab for record in records for case_id, slab in record.slabs.items()}
    if not cases:
        broken = any(record.status == "quarantined" for record in records)
        raise (RunFailed if broken else UserError)(
            "no scan could be stored; the table above says why"
        )
    of_scan = group_patients(records, convert)
    patients = {case_id: of_scan[slab["parent"]] for case_id, slab in cases.items()}
    splits = _splits(records, cases, patients, convert)
    imputed = sorted(case_id for case_id, slab in cases.items() if "imputed_by" in slab)
    shown = public_settings(convert)
    spacing = np.median([slab["slab"]["spacing_mm"] for slab in cases.values()], axis=0)
    foreground = _foreground(records, splits)
    attributes = {
        case_id: {**cases[case_id], "patient": patients[case_id]} for case_id in sorted(cases)
    }
    return {
        "schema": SCHEMA,
        "name": name,
        "unit": "HU",
        "label_names": list(CLASS_NAMES),
        "convert": shown,
        "convert_sha256": settings_sha256(shown),
        "content_sha256": _content_sha256(records),
        "spacing_mm": [round(float(s), 6) for s in spacing],
        "intensity": choose_intensity(foreground, convert.cleaning).model_dump(),
        "fingerprint": intensity_fingerprint(foreground),
        "coverage": pooled_coverage(
            r.facts["coverage"]
            for r in records
            if r.slabs and "coverage" in r.facts and r.status != "imputed"
        ),
        "splits": {**splits.to_json(), **({TRAIN_ONLY: imputed} if imputed else {})},
        "cases": {
            case_id: {k: v for k, v in slab.items() if k != "files"}
            for case_id, slab in attributes.items()
        },
        "audit": collect_audit(records),
    }


def collect_audit(records: Iterable[CaseRecord]) -> dict[str, Any]:
    """Status, findings and facts of every scan, with what shows only between scans (duplicates, overlaps)."""
    records = list(records)
    between = report_duplicates(
        find_duplicates({r.case_id: r.voxel_sha256 for r in records if r.voxel_sha256})
    )
    overlaps = report_ircadb_overlaps(r.case_id for r in records)
    found = {}
    for record in records:
        extra = [
            f.to_json()
            for f in (between.get(record.case_id), overlaps.get(record.case_id))
            if f is not None
        ]
        entry = {
            "status": record.status,
            "findings": [*record.findings, *extra],
            "facts": record.facts,
        }
        found[record.case_id] = {**entry, "stored_as": sorted(record.slabs)}
    return found


def group_patients(records: Sequence[CaseRecord], convert: ConvertConfig) -> dict[str, str]:
    """Scan to patient: who the CSV calls the same, scans with the same voxels, and 3D-IRCADb's doubles are one."""
    ids = sorted(record.case_id for record in records)
    named = read_patients(convert.splits.patients, ids)
    groups: list[Sequence[str]] = list(
        find_duplicates({r.case_id: r.voxel_sha256 for r in records if r.voxel_sha256})
    )
    groups += find_ircadb_overlaps(ids)
    by_name: dict[str, list[str]] = {}
    for scan in ids:
        by_name.setdefault(named[scan], []).append(scan)
    groups += by_name.values()
    first = {scan: scan for scan in ids}

    def root(scan: str) -> str:
        while first[scan] != scan:
            scan = first[scan]
        return scan

    for group in groups:
        for scan in group[1:]:
            one, other = sorted((root(group[0]), root(scan)))
            first[other] = one
    return {scan: root(scan) for scan in ids}


def _splits(
    records: Sequence[CaseRecord],
    cases: Mapping[str, Any],
    patients: Mapping[str, str],
    convert: ConvertConfig,
) -> Splits:
    labelled = {
        case_id: slab["class_voxels"] for case_id, slab in cases.items() if _by_people(slab)
    }
    burden = {
        case_id: tumour / max(1, liver + tumour) for case_id, (_, liver, tumour) in labelled.items()
    }
    held_out = {case_id for record in records if not record.training for case_id in record.slabs}
    scans = {case_id: cases[case_id]["parent"] for case_id in burden}
    return make_splits(burden, patients, convert.splits, held_out & burden.keys(), scans)


def _by_people(slab: Mapping[str, Any]) -> bool:
    return slab["labelled"] and "imputed_by" not in slab


def _foreground(records: Sequence[CaseRecord], splits: Splits) -> HuHistogram:
    """Of all scans but the test set's, which nothing may be learnt from."""
    test = set(splits.test)
    with_label = [record for record in records if record.slabs and record.histogram]
    known = [record for record in with_label if not test & record.slabs.keys()]
    return pool_histograms(
        HuHistogram.from_json(record.histogram) for record in known or with_label
    )


def _content_sha256(records: Iterable[CaseRecord]) -> str:
    files = {case_id: slab["files"] for record in records for case_id, slab in record.slabs.items()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
