"""Converts one scan: audit -> slab -> write. Runs in a worker process.

    audit_scan     audit_stage    ScanFiles   -> AuditedScan   image, repaired label, findings
    place_scan     slab_stage     AuditedScan -> PlacedScan    cleaned image, label, slabs
    write_slabs    write_stage    PlacedScan  -> CaseRecord    arrays in the store, checksums

Each stage returns a frozen record that carries the `CaseRecord` so far, so a stage that fails loses
nothing of the stages before it. The files of a scan are read once. Nothing here depends on other
scans: the stored bytes are the same for any number of workers. What needs all scans (clip,
normalisation, splits, duplicates) is computed from the records and stored in the root
(`root_metadata`).
"""

import shutil
from dataclasses import replace

from liverseg_dist.data.conversion.audit_stage import audit_scan, label_with_run, read_scan
from liverseg_dist.data.conversion.case_records import (
    CaseJob,
    CaseRecord,
    hash_source,
    is_up_to_date,
    read_record,
    remove_outputs,
    write_record,
)
from liverseg_dist.data.conversion.case_writer import StagingDir
from liverseg_dist.data.conversion.slab_stage import place_scan
from liverseg_dist.data.conversion.store_locks import StoreLocks
from liverseg_dist.data.conversion.write_stage import save_overview, write_slabs
from liverseg_dist.data.findings import Finding, ScanFileError
from liverseg_dist.data.store.layout import CASES, PRIVATE_DIR
from liverseg_dist.locks import hold_lock

MAX_REASON_CHARACTERS = 200


def convert_case(job: CaseJob) -> tuple[CaseRecord, bool]:
    """Convert one scan unless the store already holds it as the settings ask for.

    A fault of the scan is reported in its record, not raised.

    Returns:
        The record of the scan, and whether the scan was converted by this call.

    Raises:
        OSError: The store cannot be written.
    """
    if job.audit_only:
        return run_stages(job, hash_source(job.case)), True
    case_id = job.case.case_id
    staging = StagingDir(job.store, case_id)
    with hold_lock(StoreLocks(job.store / PRIVATE_DIR).case(case_id)) as is_locked:
        # Without the lock (a file system that has none) the files may belong to another process.
        if is_locked:
            staging.remove()
        source_sha256 = hash_source(job.case)
        before = read_record(job.store, case_id)
        # Checked under the lock: another process may have converted the scan in the meantime.
        if before is not None and is_up_to_date(before, job, source_sha256):
            return before, False
        remove_outputs(job.store, case_id)
        try:
            record = run_stages(job, source_sha256)
        except OSError as error:
            # A failed write may carry no path: name the store, where space can be freed.
            place = error.filename or str(job.store)
            raise OSError(error.errno, error.strerror, place) from None
        # The record is written last: after a crash before it, the scan is converted again.
        _remove_outdated_cases(job, before, record)
        write_record(job.store, record)
        if is_locked:
            staging.remove()
        return record, True


def run_stages(job: CaseJob, source_sha256: str) -> CaseRecord:
    """Take a scan through all stages and return its record.

    Raises:
        OSError: The store cannot be written.
    """
    record = CaseRecord(
        case_id=job.case.case_id,
        training=job.training,
        source_sha256=source_sha256,
        settings_sha256=job.settings_sha256,
        status="quarantined",
        findings=(),
    )
    try:
        scan = read_scan(job)
    except ScanFileError as error:
        return replace(record, findings=(*job.case.findings, error.to_finding()))
    try:
        audited = audit_scan(job, scan, record)
        record = audited.record
        audited = label_with_run(job, audited)
        record = audited.record
        if job.audit_only:
            return record
        if not audited.is_wanted:
            save_overview(job, audited.image, job.channels[audited.reference_channel])
            return record
        placed = place_scan(job, audited)
        record = placed.record
        return write_slabs(job, placed)
    except OSError:
        # A full or read-only disk is not a fault of the scan.
        raise
    except Exception as error:
        # One scan must not stop the others; the exit code of the command reports the failure.
        return _quarantine(record, error)


def _quarantine(record: CaseRecord, error: Exception) -> CaseRecord:
    """The record of a scan whose conversion failed, with what the completed stages found."""
    message = " ".join(str(error).split())[:MAX_REASON_CHARACTERS]
    reason = f"conversion failed ({type(error).__name__}: {message})"
    return replace(
        record,
        status="quarantined",
        findings=(*record.findings, Finding("error", "failed", reason)),
        slabs={},
        # Memory may suffice in the next run: then the scan is converted again.
        final=not isinstance(error, MemoryError),
    )


def _remove_outdated_cases(job: CaseJob, before: CaseRecord | None, now: CaseRecord) -> None:
    """Remove cases that the scan had before and no longer has, e.g. tiles of another policy."""
    if before is None:
        return
    for case_id in before.slabs.keys() - now.slabs.keys():
        shutil.rmtree(job.store / CASES / case_id, ignore_errors=True)
