"""The whole conversion: open the store for these settings, run the scans, write the root when all are known.

    .liverseg/settings.json    what the store is made with; a run with other settings is refused unless forced
    .liverseg/records/         one file per scan, written when the scan is stored (or found unfit)
    .liverseg/aside/           files under way; empty when nobody converts
    .liverseg/locks/           see `locks`

The root appears last, with the checksums, by whoever finds every scan's record present: the tasks of a SLURM array need
no master. It is withdrawn before anything it speaks of changes: a store that opens is whole, whenever a process died.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from liverseg_dist.config import ConvertConfig
from liverseg_dist.data.audit.audit_page import audit_page
from liverseg_dist.data.conversion.case_records import (
    CaseJob,
    CaseRecord,
    Labeller,
    read_record,
    record_file,
    thumbnail_file,
)
from liverseg_dist.data.conversion.case_writer import (
    GROUP,
    PRIVATE,
    ROOT,
    SUMS,
    StagingDir,
    json_text,
    root_text,
    write_text,
)
from liverseg_dist.data.conversion.executors import Executor
from liverseg_dist.data.conversion.root_metadata import root_content
from liverseg_dist.data.conversion.settings_match import (
    list_setting_differences,
    settings_that_must_match,
)
from liverseg_dist.data.conversion.store_locks import StoreLocks
from liverseg_dist.data.io.dataset_index import MsdDataset
from liverseg_dist.data.io.spacing_table import read_spacing_table
from liverseg_dist.data.store.layout import CASES
from liverseg_dist.errors import UserError
from liverseg_dist.files import file_sha256
from liverseg_dist.locks import hold_lock

SETTINGS = f"{PRIVATE}/settings.json"
Done = Callable[[CaseRecord, bool], None]


@dataclass(frozen=True)
class Conversion:
    """A data set, the store it goes to and how."""

    dataset: MsdDataset
    store: Path
    convert: ConvertConfig
    labeller: Labeller | None = None
    """The run `convert.labels_from`, as a function."""

    def jobs(self, *, audit_only: bool = False) -> list[CaseJob]:
        """Largest files first, so that the last worker does not end long after the others."""
        table = self.convert.cleaning.spacing_table
        spacing = read_spacing_table(table, self._ids) if table is not None else {}
        jobs = [
            CaseJob(
                case,
                training,
                self.store,
                self.convert,
                spacing.get(case.case_id),
                audit_only,
                self.labeller,
            )
            for cases, training in ((self.dataset.training, True), (self.dataset.test, False))
            for case in cases
        ]
        return sorted(jobs, key=lambda job: (-_size(job.case.image), job.case.case_id))

    @contextmanager
    def opened(self, *, force: bool) -> Iterator[None]:
        """The store's folder, made or continued. Raises `UserError` if it was made otherwise, unless `force`."""
        self._refuse_foreign_folder()
        with ExitStack() as session:
            with hold_lock(self._locks.opening):
                self._agree(force)
                session.enter_context(hold_lock(self._locks.sessions, shared=True))
            yield

    def finish(self) -> list[CaseRecord] | None:
        """Write the root if every scan has its record; None when some are still missing (other shards)."""
        with hold_lock(self._locks.root) as alone:
            records = self._records()
            if records is None:
                return None
            aside = StagingDir(self.store, ROOT)
            if alone:
                aside.clear()
            content = root_content(self.dataset.name, self.convert, records)
            self._remove_strangers(records)
            write_text(aside, self.store / CASES / "zarr.json", GROUP)
            thumbnails = {
                record.case_id: thumbnail_file(self.store, record.case_id) for record in records
            }
            write_text(aside, self.store / "audit.html", audit_page(content, thumbnails))
            root = root_text(content)
            write_text(aside, self.store / SUMS, self._sums(records, root))
            write_text(aside, self.store / "zarr.json", root)
            if alone:
                aside.clear()
        return records

    @property
    def _locks(self) -> StoreLocks:
        return StoreLocks(self.store / PRIVATE)

    @cached_property
    def _ids(self) -> list[str]:
        return sorted(case.case_id for case in (*self.dataset.training, *self.dataset.test))

    def _refuse_foreign_folder(self) -> None:
        for name in (
            CASES,
            PRIVATE,
            *(f"{PRIVATE}/{folder}" for folder in ("records", "thumbnails", "aside", "locks")),
        ):
            if (
                self.store / name
            ).is_symlink():  # what we write and clear there would lie outside the store
                raise UserError(
                    f"{self.store / name}: is a link; the folders of a store are its own, remove the link"
                )
        if (self.store / PRIVATE).is_dir() or not self.store.exists():
            return
        if not self.store.is_dir() or any(self.store.iterdir()):
            raise UserError(
                f"{self.store}: is there and no store of ours; give a new folder, nothing is overwritten"
            )

    def _agree(self, force: bool) -> None:
        """The store's settings are ours, or become ours."""
        mark = self.store / SETTINGS
        wanted = settings_that_must_match(
            self.dataset.name,
            self.convert,
            None if self.labeller is None else self.labeller.fingerprint,
        )
        before = _read_json(mark)
        gone = sorted(self._recorded() - set(self._ids))
        changes = list_setting_differences(before, wanted) if mark.exists() else []
        if gone:
            changes.append(
                f"{len(gone)} of its scans are not in this data set ({', '.join(gone[:3])})"
            )
        if changes and not force:
            raise UserError(
                f"{self.store}: made with other settings: {'; '.join(changes[:4])}{' ...' if changes[4:] else ''}. "
                "Give another folder, or --force converts again what that touches"
            )
        if before == wanted and not gone:
            return
        try:
            with hold_lock(self._locks.sessions, wait=False), hold_lock(self._locks.root):
                (self.store / "zarr.json").unlink(
                    missing_ok=True
                )  # what it says is about to become untrue
                write_text(StagingDir(self.store, ROOT), mark, json_text(wanted))
        except BlockingIOError:
            raise UserError(
                f"{self.store}: another conversion writes it with other settings; wait for it"
            ) from None

    def _recorded(self) -> set[str]:
        return {path.stem for path in (self.store / PRIVATE / "records").glob("*.json")}

    def _records(self) -> list[CaseRecord] | None:
        expected = {job.case.case_id: job.settings_sha256 for job in self.jobs()}
        records = [read_record(self.store, case_id) for case_id in self._ids]
        known = [r for r in records if r is not None and r.settings_sha256 == expected[r.case_id]]
        return known if len(known) == len(self._ids) else None

    def _remove_strangers(self, records: list[CaseRecord]) -> None:
        """Scans that the data set no longer has, and folders nobody knows."""
        stored = {case_id for record in records for case_id in record.slabs}
        for folder in (self.store / CASES).glob("*/"):
            if folder.name not in stored:
                shutil.rmtree(folder, ignore_errors=True)
        for scan in self._recorded() - set(self._ids):
            record_file(self.store, scan).unlink(missing_ok=True)
            thumbnail_file(self.store, scan).unlink(missing_ok=True)

    def _sums(self, records: list[CaseRecord], root: str) -> str:
        sums = {
            f"{CASES}/{case_id}/{name}": digest
            for record in records
            for case_id, slab in record.slabs.items()
            for name, digest in slab["files"].items()
        }
        others = [
            self.store / CASES / "zarr.json",
            self.store / "audit.html",
            self.store / SETTINGS,
        ]
        for scan in self._ids:
            others += [
                p
                for p in (record_file(self.store, scan), thumbnail_file(self.store, scan))
                if p.exists()
            ]
        sums |= {path.relative_to(self.store).as_posix(): file_sha256(path) for path in others}
        sums["zarr.json"] = hashlib.sha256(root.encode()).hexdigest()
        return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def run_jobs(jobs: list[CaseJob], workers: int, done: Done, executor: Executor) -> list[CaseRecord]:
    """Records in the order of scan ids; `done` is called as each scan ends. Raises `RunFailed` for a lost worker."""
    records = []
    for record, made in executor(jobs, workers):
        done(record, made)
        records.append(record)
    return sorted(records, key=lambda record: record.case_id)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
