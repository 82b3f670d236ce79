"""Converts a data set: opens the store, converts the scans, and writes the root when all are done.

    .liverseg/settings.json    settings of the store; other settings are refused unless forced
    .liverseg/records/         one file for each scan, written when the scan is stored or rejected
    .liverseg/aside/           staged files; empty when no conversion runs
    .liverseg/locks/           see `store_locks`

The root is written last, with the checksums, by the process that finds a record for every scan: the
tasks of a SLURM array need no coordinator. The root is removed before anything it describes
changes. Therefore a store that can be opened is complete, even after a process was killed.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from liverseg_dist.config import ChannelConfig, ConvertConfig
from liverseg_dist.data.annotated import find_annotated
from liverseg_dist.data.conversion.case_records import CaseJob, CaseRecord, Labeller, read_record
from liverseg_dist.data.conversion.executors import Executor
from liverseg_dist.data.conversion.output_dir import (
    check_output_dir,
    check_settings_match,
    remove_orphans,
    write_root_files,
)
from liverseg_dist.data.conversion.root_metadata import build_root
from liverseg_dist.data.conversion.settings_match import settings_that_must_match
from liverseg_dist.data.conversion.store_locks import StoreLocks
from liverseg_dist.data.io.dataset_index import DatasetIndex
from liverseg_dist.data.io.scan_reader import size_of_source
from liverseg_dist.data.io.spacing_table import read_spacing_table
from liverseg_dist.data.label_plan import LabelPlan, plan_labels
from liverseg_dist.data.store.layout import PRIVATE_DIR
from liverseg_dist.errors import UserError, printable
from liverseg_dist.locks import hold_lock
from liverseg_dist.texts.names import list_some

OnCaseDone = Callable[[CaseRecord, bool], None]
"""Called with the record of a scan, and whether this run converted it."""


@dataclass(frozen=True)
class Conversion:
    """A data set, the store it is converted to, and the settings."""

    dataset: DatasetIndex
    store: Path
    convert: ConvertConfig
    labeller: Labeller | None = None
    """The run `convert.labels_from`, as a function."""

    @property
    def channels(self) -> tuple[ChannelConfig, ...]:
        """Channels of the store.

        Raises:
            UserError: The settings name another number of channels than the data set was read with.
        """
        found, wanted = self.dataset.channels, self.convert.channels
        if wanted is not None and len(wanted) != len(found):
            raise UserError(
                f"convert.channels names {len(wanted)} channels, the data set has {len(found)}"
            )
        return wanted or found

    @cached_property
    def label_plan(self) -> LabelPlan:
        """The scheme of the store, and how the labels of each source become its class values.

        Raises:
            UserError: The settings name an unknown label, or no structure is left.
        """
        plan = plan_labels(self.dataset.sources, self.convert.labels)
        for name in self.convert.slab.around or ():
            if plan.scheme.find(name) is None:
                known = list_some([printable(other) for other in plan.scheme.structure_names], 20)
                raise UserError(
                    f"convert.slab.around: no structure is called {printable(name)}; the "
                    f"structures are {known}"
                )
        return plan

    def jobs(self, *, audit_only: bool = False) -> list[CaseJob]:
        """One job for each scan.

        Largest files first: a large scan that started last would keep one worker busy at the end.
        """
        table = self.convert.cleaning.spacing_table
        spacing = read_spacing_table(table, self._scan_ids) if table is not None else {}
        mappings = self.label_plan.mappings
        all_cases = (*self.dataset.training, *self.dataset.test)
        annotated = find_annotated(all_cases, mappings, self.convert)
        jobs = []
        for cases, training in ((self.dataset.training, True), (self.dataset.test, False)):
            for case in cases:
                job = CaseJob(
                    case=case,
                    training=training,
                    store=self.store,
                    convert=self.convert,
                    true_spacing_mm=spacing.get(case.case_id),
                    audit_only=audit_only,
                    labeller=self.labeller,
                    mapping=mappings[case.source],
                    annotated=annotated[case.case_id],
                    channels=self.channels,
                )
                jobs.append(job)
        return sorted(jobs, key=lambda job: (-size_of_source(job.case.image), job.case.case_id))

    @contextmanager
    def opened(self, *, force: bool) -> Iterator[None]:
        """Create the store's folder, or continue it.

        Args:
            force: Continue a store that was made with other settings; the affected scans are
                converted again.

        Raises:
            UserError: The folder is not a store, or was made with other settings.
        """
        check_output_dir(self.store)
        labels_from = None if self.labeller is None else self.labeller.fingerprint
        with ExitStack() as session:
            # Held until this conversion is registered: otherwise another one could change the
            # settings between the check and the registration.
            with hold_lock(self._locks.opening):
                wanted = settings_that_must_match(
                    self.dataset.name,
                    self.convert,
                    labels_from,
                    channels=self.channels,
                    labels=self.label_plan.scheme,
                )
                check_settings_match(self.store, wanted, self._scan_ids, force=force)
                session.enter_context(hold_lock(self._locks.sessions, shared=True))
            yield

    def finish(self) -> list[CaseRecord] | None:
        """Write the root of the store.

        Returns:
            All records; None while some are missing because other processes still convert.
        """
        with hold_lock(self._locks.root) as is_locked:
            records = self._read_current_records()
            if records is None:
                return None
            content = build_root(
                self.dataset.name,
                self.convert,
                records,
                channels=self.channels,
                labels=self.label_plan.scheme,
            )
            remove_orphans(self.store, records)
            write_root_files(self.store, content, records, is_locked=is_locked)
        return records

    @property
    def _locks(self) -> StoreLocks:
        return StoreLocks(self.store / PRIVATE_DIR)

    @cached_property
    def _scan_ids(self) -> list[str]:
        return sorted(case.case_id for case in (*self.dataset.training, *self.dataset.test))

    def _read_current_records(self) -> list[CaseRecord] | None:
        """The records of all scans, made with the current settings; None when one is missing."""
        # Records of earlier settings exist after --force until their scans are converted again.
        expected = {job.case.case_id: job.settings_sha256 for job in self.jobs()}
        records = []
        for case_id in self._scan_ids:
            record = read_record(self.store, case_id)
            if record is None or record.settings_sha256 != expected[case_id]:
                return None
            records.append(record)
        return records


def run_jobs(
    jobs: list[CaseJob], workers: int, on_done: OnCaseDone, executor: Executor
) -> list[CaseRecord]:
    """Convert scans.

    Args:
        jobs: The scans, in the order in which they start.
        workers: Number of workers; 0: chosen by the executor.
        on_done: Called when a scan is done.
        executor: Where the workers run.

    Returns:
        Records in the order of scan ids.

    Raises:
        RunFailed: A worker was lost.
    """
    records = []
    for record, is_new in executor(jobs, workers):
        on_done(record, is_new)
        records.append(record)
    return sorted(records, key=lambda record: record.case_id)
