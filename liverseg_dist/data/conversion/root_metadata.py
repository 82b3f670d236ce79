"""The root attribute of a store, computed from the records of all scans.

It holds what needs more than one scan: settings, intensity statistics, splits, duplicates.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from liverseg_dist.config import CT_CHANNELS, ChannelConfig, ConvertConfig
from liverseg_dist.data.audit.duplicates import (
    find_duplicates,
    find_ircadb_overlaps,
    report_duplicates,
    report_ircadb_overlaps,
)
from liverseg_dist.data.conversion.case_records import PATIENT_FACT, CaseRecord
from liverseg_dist.data.conversion.channel_histograms import pool_channel_histograms
from liverseg_dist.data.conversion.settings_match import public_settings, settings_sha256
from liverseg_dist.data.conversion.stored_case import StoredCase
from liverseg_dist.data.patients import read_patients
from liverseg_dist.data.preprocessing.intensity_statistics import (
    HuHistogram,
    choose_intensity,
    intensity_fingerprint,
)
from liverseg_dist.data.preprocessing.slab_coverage import pool_coverage
from liverseg_dist.data.splits import Splits, make_splits
from liverseg_dist.data.store.layout import SCHEMA, TRAIN_ONLY
from liverseg_dist.errors import RunFailed, UserError
from liverseg_dist.labels import LITS_SCHEME, LabelScheme

HALF_VOLUME_ML = 1000.0
"""Labelled volume with the number 0.5 in the stratification of cases without lesions."""


def build_root(
    name: str,
    convert: ConvertConfig,
    records: Sequence[CaseRecord],
    *,
    channels: Sequence[ChannelConfig] = CT_CHANNELS,
    labels: LabelScheme = LITS_SCHEME,
) -> dict[str, Any]:
    """The root attribute `liverseg` as JSON; its keys are documented in `data/README.md`.

    Args:
        name: Name of the data set.
        convert: Settings of the conversion.
        records: Records of all scans, in the order of scan ids.
        channels: Channels of the images.
        labels: Scheme of the labels.

    Raises:
        RunFailed: No scan was stored, and at least one could not be converted.
        UserError: No scan was stored because the audit excluded all.
    """
    cases: dict[str, StoredCase] = {}
    for record in records:
        cases.update(record.slabs)
    if not cases:
        has_failures = any(record.status == "quarantined" for record in records)
        error_type = RunFailed if has_failures else UserError
        raise error_type("no scan could be stored; see the reasons in the table above")
    patient_of_scan = group_patients(records, convert)
    patients = {case_id: patient_of_scan[stored.parent] for case_id, stored in cases.items()}
    splits = _make_splits(records, cases, patients, convert, labels)
    shown = public_settings(convert)
    spacing_mm = np.median([stored.spacing_mm for stored in cases.values()], axis=0)
    foreground = _pool_foreground(records, splits, channels)
    case_metadata = {}
    for case_id in sorted(cases):
        attributes = cases[case_id].to_attributes()
        case_metadata[case_id] = {**attributes, "patient": patients[case_id]}
    return {
        "schema": SCHEMA,
        "name": name,
        "unit": "HU" if all(channel.is_ct for channel in channels) else "stored",
        "labels": labels.to_json(),
        "channels": [channel.model_dump() for channel in channels],
        "convert": shown,
        "convert_sha256": settings_sha256(shown),
        "content_sha256": _hash_content(records),
        "spacing_mm": [round(float(mm), 6) for mm in spacing_mm],
        "intensity": _intensity_json(foreground, convert, channels),
        "fingerprint": _fingerprint_json(foreground, channels),
        "coverage": _pool_manual_coverage(records),
        "splits": _splits_json(splits, cases),
        "cases": case_metadata,
        "audit": collect_audit(records),
    }


def collect_audit(records: Iterable[CaseRecord]) -> dict[str, Any]:
    """Status, findings and facts of every scan as JSON, by scan id.

    Includes findings that need several scans: duplicates, and overlaps with 3D-IRCADb.
    """
    records = list(records)
    duplicates = report_duplicates(_find_duplicate_scans(records))
    overlaps = report_ircadb_overlaps(record.case_id for record in records)
    audit = {}
    for record in records:
        findings = list(record.findings)
        for source in (duplicates, overlaps):
            finding = source.get(record.case_id)
            if finding is not None:
                findings.append(finding)
        audit[record.case_id] = {
            "status": record.status,
            "findings": [finding.to_json() for finding in findings],
            "facts": record.facts,
            "stored_as": sorted(record.slabs),
        }
    return audit


def group_patients(records: Sequence[CaseRecord], convert: ConvertConfig) -> dict[str, str]:
    """Patient of each scan, named by the first of the patient's scans.

    Scans belong to one patient when the patients table (`convert.splits.patients`) says so, when
    their voxels are equal, when they are the known duplicates of 3D-IRCADb in LiTS, or when their
    source states the same patient (DICOM).
    """
    scan_ids = sorted(record.case_id for record in records)
    table = read_patients(convert.splits.patients, scan_ids)
    scans_by_patient: dict[str, list[str]] = {}
    for scan in scan_ids:
        scans_by_patient.setdefault(table[scan], []).append(scan)
    stated: dict[str, list[str]] = {}
    for record in sorted(records, key=lambda record: record.case_id):
        if record.facts.get(PATIENT_FACT):
            stated.setdefault(str(record.facts[PATIENT_FACT]), []).append(record.case_id)
    groups: list[Sequence[str]] = [
        *stated.values(),
        *_find_duplicate_scans(records),
        *find_ircadb_overlaps(scan_ids),
        *scans_by_patient.values(),
    ]
    # Groups may overlap, so they are merged as a disjoint-set forest: each scan points to an
    # earlier scan of the same patient, the first scan of a patient to itself.
    parent = {scan: scan for scan in scan_ids}

    def find_first(scan: str) -> str:
        while parent[scan] != scan:
            scan = parent[scan]
        return scan

    for group in groups:
        for scan in group[1:]:
            earlier, later = sorted((find_first(group[0]), find_first(scan)))
            parent[later] = earlier
    return {scan: find_first(scan) for scan in scan_ids}


def _find_duplicate_scans(records: Iterable[CaseRecord]) -> list[tuple[str, ...]]:
    """Groups of scans with equal voxels. Scans that could not be read have no hash."""
    hashes = {record.case_id: record.voxel_sha256 for record in records if record.voxel_sha256}
    return list(find_duplicates(hashes))


def _make_splits(
    records: Sequence[CaseRecord],
    cases: Mapping[str, StoredCase],
    patients: Mapping[str, str],
    convert: ConvertConfig,
    labels: LabelScheme,
) -> Splits:
    # Test sets and validation folds contain manual labels only.
    burden = {}
    scans = {}
    for case_id, stored in cases.items():
        if stored.has_manual_label:
            burden[case_id] = measure_burden(stored, labels)
            scans[case_id] = stored.parent
    burden = _separate_strata(burden, cases)
    # Scans of the data set's own test list; `make_splits` decides how they are used.
    held_out: set[str] = set()
    for record in records:
        if not record.training:
            held_out |= record.slabs.keys()
    return make_splits(burden, patients, convert.splits, held_out & burden.keys(), scans)


def measure_burden(stored: StoredCase, labels: LabelScheme) -> float:
    """The number from 0 to 1 by which cases are stratified.

    The voxels of lesions over those of the organs that contain them (over all voxels of structures
    for lesions without container). Without lesions in the scheme, or where none was annotated, it
    grows with the labelled volume.
    """
    annotated = labels.structure_names if stored.annotated is None else stored.annotated
    lesion_values: set[int] = set()
    organ_values: set[int] = set()
    for lesion in labels.lesions:
        if lesion.name in annotated:
            lesion_values |= set(lesion.values)
            if lesion.inside is not None:
                organ_values |= set(labels.structure(lesion.inside).values)
    counts = stored.class_voxels
    if not lesion_values:
        z_mm, y_mm, x_mm = stored.spacing_mm
        volume_ml = sum(counts[1:]) * z_mm * y_mm * x_mm / 1000
        return volume_ml / (volume_ml + HALF_VOLUME_ML)
    if not organ_values:
        organ_values = set(range(1, labels.num_classes))
    lesion_voxels = sum(counts[value] for value in lesion_values)
    return lesion_voxels / max(1, sum(counts[value] for value in organ_values | lesion_values))


def _separate_strata(
    burden: Mapping[str, float], cases: Mapping[str, StoredCase]
) -> dict[str, float]:
    """Burdens in which cases with other annotated structures follow each other.

    `make_splits` orders by burden; so every fold receives cases of each kind of annotation.
    """
    kinds = sorted({cases[case_id].annotated or () for case_id in burden})
    return {
        case_id: value + kinds.index(cases[case_id].annotated or ())
        for case_id, value in burden.items()
    }


def _splits_json(splits: Splits, cases: Mapping[str, StoredCase]) -> dict[str, Any]:
    content: dict[str, Any] = dict(splits.to_json())
    imputed = [case_id for case_id, stored in cases.items() if stored.imputed_by is not None]
    if imputed:
        content[TRAIN_ONLY] = sorted(imputed)
    return content


def _pool_manual_coverage(records: Iterable[CaseRecord]) -> dict[str, Any]:
    """What the slabs contain of all manual labels."""
    coverages = []
    for record in records:
        if record.slabs and record.status != "imputed" and "coverage" in record.facts:
            coverages.append(record.facts["coverage"])
    return pool_coverage(coverages)


def _intensity_json(
    foreground: Sequence[HuHistogram], convert: ConvertConfig, channels: Sequence[ChannelConfig]
) -> dict[str, Any] | list[dict[str, Any] | None]:
    """Normalisation of each channel; null for a channel that is normalised by scan.

    A single channel of CT has the entry itself, as in the first schema.
    """
    entries: list[dict[str, Any] | None] = []
    for channel, histogram in zip(channels, foreground, strict=True):
        if channel.has_own_intensity:
            entries.append(None)
            continue
        try:
            entries.append(choose_intensity(histogram, convert.cleaning).model_dump())
        except UserError as error:
            if len(channels) == 1:
                raise
            raise UserError(f"channel {channel.name}: {error}") from None
    first = entries[0]
    return first if len(entries) == 1 and first is not None else entries


def _fingerprint_json(
    foreground: Sequence[HuHistogram], channels: Sequence[ChannelConfig]
) -> dict[str, Any]:
    """Statistics in HU of the foreground: of the channel itself if it is the only one."""
    if len(channels) == 1:
        return dict(intensity_fingerprint(foreground[0]))
    fingerprint = {}
    for channel, histogram in zip(channels, foreground, strict=True):
        if not channel.has_own_intensity:
            fingerprint[channel.name] = intensity_fingerprint(histogram)
    return {"channels": fingerprint}


def _pool_foreground(
    records: Sequence[CaseRecord], splits: Splits, channels: Sequence[ChannelConfig]
) -> list[HuHistogram]:
    """Histogram of the foreground in each channel over all scans outside the test set.

    Statistics of the test set would leak into the normalisation. Only when every labelled scan is
    in the test set are its scans used, because the store needs a normalisation.
    """
    test = set(splits.test)
    labelled = [record for record in records if record.slabs and record.histogram]
    outside_test = [record for record in labelled if not test & record.slabs.keys()]
    used = outside_test or labelled
    return pool_channel_histograms((record.histogram for record in used), channels)


def _hash_content(records: Iterable[CaseRecord]) -> str:
    """SHA-256 over the checksums of all stored files."""
    files = {}
    for record in records:
        for case_id, stored in record.slabs.items():
            files[case_id] = dict(stored.files)
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
