"""The whole conversion: open the store for these settings, run the cases, write the root when all are known.

Who finds every case's record present writes the root, so workers of a SLURM array need no master.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from liverseg_dist.config import ConvertConfig
from liverseg_dist.data.audit_page import audit_page
from liverseg_dist.data.cleaning.intensity import HuHistogram, fingerprint_of, intensity_of, pool
from liverseg_dist.data.conversion.case import CaseJob, CaseRecord, convert_case, read_record
from liverseg_dist.data.conversion.writer import PRIVATE, write_json, write_root, write_text
from liverseg_dist.data.duplicates import duplicate_findings, find_duplicates, ircadb_findings
from liverseg_dist.data.layout import CASES, SCHEMA
from liverseg_dist.data.msd import MsdDataset
from liverseg_dist.data.spacing_table import read_spacing_table
from liverseg_dist.data.splits import make_splits, read_patients
from liverseg_dist.errors import RunFailed, UserError
from liverseg_dist.labels import CLASS_NAMES

SETTINGS = "settings.json"
THREAD_KEYS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
Done = Callable[[CaseRecord, bool], None]
Runner = Callable[[list[CaseJob]], Iterable[tuple[CaseRecord, bool]]]


@dataclass(frozen=True)
class Conversion:
    """A data set, the store it goes to and how."""

    dataset: MsdDataset
    store: Path
    convert: ConvertConfig

    def jobs(self, *, audit_only: bool = False) -> list[CaseJob]:
        """Largest files first, so that the last worker does not end long after the others."""
        table = self.convert.cleaning.spacing_table
        spacing = read_spacing_table(table) if table is not None else {}
        digest = settings_sha256(self.convert)
        jobs = [
            CaseJob(case, training, self.store, self.convert, digest, spacing.get(case.case_id), audit_only)
            for cases, training in ((self.dataset.training, True), (self.dataset.test, False))
            for case in cases
        ]
        return sorted(jobs, key=lambda job: (-_size(job.case.image), job.case.case_id))

    def open(self, *, force: bool) -> None:
        """Make the store's folder, or see that it was made with these settings. Raises `UserError`."""
        mark = self.store / PRIVATE / SETTINGS
        wanted = {"schema": SCHEMA, "settings_sha256": settings_sha256(self.convert)}
        if mark.exists():
            before = json.loads(mark.read_text(encoding="utf-8"))
            if before != wanted and not force:
                raise UserError(
                    f"{self.store}: was made with other settings; convert into another folder, or --force converts "
                    "it again"
                )
        elif self.store.exists() and (not self.store.is_dir() or any(self.store.iterdir())):
            raise UserError(f"{self.store}: is there and no store of ours; give a new folder, nothing is overwritten")
        if not mark.exists() or json.loads(mark.read_text(encoding="utf-8")) != wanted:
            (self.store / "zarr.json").unlink(missing_ok=True)  # what it says is about to become untrue
            write_json(mark, wanted)
        for name in (CASES, f"{PRIVATE}/aside", f"{PRIVATE}/locks"):
            (self.store / name).mkdir(parents=True, exist_ok=True)

    def finish(self) -> list[CaseRecord] | None:
        """Write the root if every case has its record; None when some are still missing (other shards)."""
        digest = settings_sha256(self.convert)
        ids = sorted(case.case_id for case in (*self.dataset.training, *self.dataset.test))
        records = [read_record(self.store, case_id) for case_id in ids]
        known = [record for record in records if record is not None and record.settings_sha256 == digest]
        if len(known) < len(ids):
            return None
        write_root(self.store, root_content(self.dataset.name, self.convert, known))
        write_text(self.store / "audit.html", audit_page(self.dataset.name, known, self.store / PRIVATE / "thumbnails"))
        return known


def settings_sha256(convert: ConvertConfig) -> str:
    """Of what a case's bytes depend on: splits and the number of workers may change without a new conversion."""
    relevant = convert.model_dump(mode="json", exclude={"workers": True, "splits": True})
    return hashlib.sha256(json.dumps({"schema": SCHEMA, **relevant}, sort_keys=True).encode()).hexdigest()


def run_jobs(jobs: list[CaseJob], workers: int, done: Done, runner: Runner | None = None) -> list[CaseRecord]:
    """Records in the order of case ids; `done` is called as each case ends. Raises `RunFailed` for a lost worker."""
    records = []
    for record, made in (runner or (lambda all_jobs: _in_processes(all_jobs, workers)))(jobs):
        done(record, made)
        records.append(record)
    return sorted(records, key=lambda record: record.case_id)


def _in_processes(jobs: list[CaseJob], workers: int) -> Iterator[tuple[CaseRecord, bool]]:
    workers = min(workers or len(os.sched_getaffinity(0)), max(1, len(jobs)))
    if workers == 1:
        yield from map(convert_case, jobs)
        return
    # One thread each: the cores are taken by the other workers. Spawned processes read these at start.
    before = {key: os.environ.get(key) for key in THREAD_KEYS}
    os.environ.update(dict.fromkeys(THREAD_KEYS, "1"))
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool_:
            futures = {pool_.submit(convert_case, job): job.case.case_id for job in jobs}
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BrokenProcessPool:
                open_ = sorted(name for future, name in futures.items() if not future.done() or future.exception())
                raise RunFailed(
                    f"a conversion worker died (out of memory?) around {', '.join(open_[:workers])}; what is done stays, "
                    "run the same line again, with convert.workers=1 if memory is short"
                ) from None
            except BaseException:
                pool_.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def root_content(name: str, convert: ConvertConfig, records: list[CaseRecord]) -> dict[str, Any]:
    """The root attribute: everything a reader asks before it reads voxels. Raises `UserError` when nothing is usable."""
    cases = {name_: slab for record in records for name_, slab in record.slabs.items()}
    if not cases:
        raise UserError("no case could be converted; see the reasons above")
    patients = read_patients(convert.splits.patients, sorted(cases))
    parents = {name_: slab["parent"] for name_, slab in cases.items()}
    patients = {name_: patients[name_] if patients[name_] != name_ else parents[name_] for name_ in cases}
    for group in find_duplicates({r.case_id: r.voxel_sha256 for r in records if r.slabs}):
        patients.update({n: group[0] for n, parent in parents.items() if parent in group})  # never part in a split
    burden = {n: slab["class_voxels"][2] / max(1, sum(slab["class_voxels"][1:])) for n, slab in cases.items()
              if slab["labelled"]}  # fmt: skip
    splits = make_splits(burden, patients, convert.splits)
    histogram = pool(HuHistogram.from_json(r.histogram) for r in records if r.slabs and r.histogram)
    public = convert.model_dump(mode="json", exclude={"workers": True, "splits": {"file": True, "patients": True}})
    public["cleaning"].pop("spacing_table", None)
    spacing = np.median([slab["slab"]["spacing_mm"] for slab in cases.values()], axis=0)
    return {
        "schema": SCHEMA,
        "name": name,
        "unit": "HU",
        "label_names": list(CLASS_NAMES),
        "convert": public,
        "convert_sha256": settings_sha256(convert),
        "content_sha256": _content_hash(cases),
        "spacing_mm": [round(float(s), 6) for s in spacing],
        "intensity": intensity_of(histogram, convert.cleaning).model_dump(),
        "fingerprint": fingerprint_of(histogram),
        "splits": splits.to_json(),
        "cases": {n: {k: v for k, v in {**cases[n], "patient": patients[n]}.items() if k != "files"} for n in sorted(cases)},
        "audit": audit_of(records),
    }


def audit_of(records: list[CaseRecord]) -> dict[str, Any]:
    """Status, findings and facts of every scan, with what shows only between scans (duplicates, overlaps)."""
    between = duplicate_findings(find_duplicates({r.case_id: r.voxel_sha256 for r in records if r.voxel_sha256}))
    overlaps = ircadb_findings(r.case_id for r in records)
    found = {}
    for record in records:
        extra = [f.to_json() for f in (between.get(record.case_id), overlaps.get(record.case_id)) if f is not None]
        entry = {"status": record.status, "findings": [*record.findings, *extra], "facts": record.facts}
        found[record.case_id] = {**entry, "stored_as": sorted(record.slabs)}
    return found


def _content_hash(cases: dict[str, dict[str, Any]]) -> str:
    files = {name: slab["files"] for name, slab in cases.items()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
