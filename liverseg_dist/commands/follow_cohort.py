"""`liverseg follow --table`: many patients, each as `liverseg follow` does it, shared among ranks
and resumable."""

import argparse
import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from liverseg_dist.clinical.cohort_page import cohort_csv, render_cohort, summarise_patient
from liverseg_dist.clinical.follow_up import FOLLOW_VERSION
from liverseg_dist.clinical.quantify import QUANTITIES_VERSION
from liverseg_dist.commands.run_distributed import report_case_failure, run_distributed
from liverseg_dist.console import write_lines
from liverseg_dist.distributed.collectives import gather_from_ranks
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.rank_zero import share_from_rank0
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, RunFailed, UserError, printable
from liverseg_dist.evaluation.ledger import Ledger, encode_file_name, fingerprint_of
from liverseg_dist.files import file_sha256, write_json, write_text
from liverseg_dist.inference.work_division import format_failure, shard_cases
from liverseg_dist.labels import LabelScheme
from liverseg_dist.texts.tables import read_table
from liverseg_dist.tracking.progress import show_progress

COLUMNS = ("patient", "date", "scan")
FollowScans = Callable[
    [argparse.Namespace, list[Path], list[Path | None], list[datetime.date]], Any
]
"""Follows one patient into `args.out`."""
Prepare = Callable[[HeartbeatMonitor], dict[Path, str]]
"""Writes the masks of all patients; returns why masks could not be written."""


@dataclass(frozen=True)
class PatientScans:
    """A patient's masks in the order of their dates."""

    patient: str
    dates: tuple[datetime.date, ...]
    masks: tuple[Path, ...]
    images: tuple[Path | None, ...]


def read_patients(file: Path) -> list[PatientScans]:
    """Read the patients of a table with the columns patient, date, scan (a mask) and image.

    The column image may be missing. Paths are relative to the table. `texts.tables` describes the
    forms that a table may have.

    Raises:
        UserError: The table is unreadable, a cell is empty, a date is invalid, or a patient has one
            scan only or two scans of one date.
    """
    scans: dict[str, list[tuple[datetime.date, Path, Path | None]]] = {}
    for row in read_table(file, COLUMNS, optional_columns=("image",)).rows:
        for column in COLUMNS:
            if not row[column]:
                raise UserError(f"{printable(file)}: line {row.line}: column {column} is empty")
        try:
            date = datetime.date.fromisoformat(row["date"])
        except ValueError:
            raise UserError(
                f"{printable(file)}: line {row.line}: {printable(row['date'])!r} is no date such "
                "as 2024-03-01"
            ) from None
        image = file.parent / row["image"] if row["image"] else None
        scans.setdefault(row["patient"], []).append((date, file.parent / row["scan"], image))
    return [_patient(file, name, entries) for name, entries in scans.items()]


def _patient(
    file: Path, name: str, entries: list[tuple[datetime.date, Path, Path | None]]
) -> PatientScans:
    # The rows of a table may have any order; growth needs that of the dates.
    dates, masks, images = zip(*sorted(entries, key=lambda entry: entry[0]), strict=True)
    if len(entries) < 2:
        raise UserError(
            f"{printable(file)}: patient {printable(name)} has one scan; following takes two"
        )
    if len(set(dates)) < len(dates):
        raise UserError(f"{printable(file)}: patient {printable(name)} has two scans of one date")
    return PatientScans(name, dates, masks, images)


def follow_cohort(
    args: argparse.Namespace,
    patients: list[PatientScans],
    scheme: LabelScheme,
    world: World,
    follow_scans: FollowScans,
    prepare: Prepare | None = None,
) -> dict[str, Any]:
    """Follow all patients of `--table`; writes a folder for each, cohort.csv, cohort.json and
    cohort.html.

    Args:
        args: options of the command.
        patients: the patients of the table.
        scheme: labels of the masks.
        world: the ranks.
        follow_scans: follows one patient.
        prepare: writes the masks first; a collective call.
    """
    if not patients:
        raise UserError(f"{printable(args.table)}: names no patient")

    def work(watch: HeartbeatMonitor) -> dict[str, Any]:
        missing = {} if prepare is None else prepare(watch)
        return _follow_all(args, patients, scheme, world, watch, follow_scans, missing)

    return run_distributed(world, args.timeout, args.out, work)


def _follow_all(
    args: argparse.Namespace,
    patients: list[PatientScans],
    scheme: LabelScheme,
    world: World,
    watch: HeartbeatMonitor,
    follow_scans: FollowScans,
    missing: dict[Path, str],
) -> dict[str, Any]:
    # Everything that changes a patient's result is part of the settings: an entry made with others is not
    # used.
    settings = {
        "follow": FOLLOW_VERSION,
        "quantities": QUANTITIES_VERSION,
        "scheme": scheme.to_json(),
        "organ": args.organ,
        "registration": args.registration,
        "connectivity": args.connectivity,
        "allow_mismatch": args.allow_mismatch,
    }
    ledger = Ledger(args.out / "ledger", settings)
    by_name = {patient.patient: patient for patient in patients}
    # The number of scans stands for the work: registration takes most of the time, once for each
    # later date.
    mine = shard_cases(
        {patient.patient: len(patient.masks) for patient in patients},
        world.global_rank,
        world.world_size,
    )
    rows: dict[str, dict[str, Any]] = {}
    failures: dict[str, tuple[str, bool]] = {}
    with show_progress("follow", len(mine)) as line:
        for name in mine:
            watch.report_progress(-1, f"following {name}")
            # A patient who cannot be followed must not cost the others, some of whom took minutes
            # already.
            try:
                rows[name] = _follow_one(args, by_name[name], ledger, follow_scans, missing)
            except (UserError, RunFailed) as error:
                failures[name] = str(error), isinstance(error, UserError)
                report_case_failure(error, world, args.out, name)
            line.advance(note=name)
    watch.report_progress(-1, "waiting for the patients of other ranks")
    parts = gather_from_ranks((rows, failures))
    rows = {name: row for part in parts for name, row in part[0].items()}
    failures = {name: failure for part in parts for name, failure in part[1].items()}
    ordered = [rows[patient.patient] for patient in patients if patient.patient in rows]
    # Nothing was done at all, so the reason is more useful than an empty page.
    if not ordered:
        text, is_mistake = next(iter(failures.values()))
        raise (UserError if is_mistake else RunFailed)(
            f"no patient could be followed; the first: {text}"
        )
    reasons = {name: text for name, (text, _) in failures.items()}
    share_from_rank0(lambda: _write_cohort(args, ordered, reasons))
    write_lines(f"{len(ordered)} patients; page: {args.out / 'cohort.html'}")
    return {
        "out": str(args.out),
        "page": str(args.out / "cohort.html"),
        "patients": len(ordered),
        "failed": reasons,
        "exit_code": EXIT_DONE if not failures else EXIT_FAILED,
    }


def _follow_one(
    args: argparse.Namespace,
    patient: PatientScans,
    ledger: Ledger,
    follow_scans: FollowScans,
    missing: dict[Path, str],
) -> dict[str, Any]:
    """A patient's row, from the ledger where its files and dates are the same."""
    # The encoded name is safe as a folder's name and cannot leave the output folder.
    folder = args.out / "patients" / encode_file_name(patient.patient)
    inputs: str | None = None
    try:
        for mask in patient.masks:
            # Also where an earlier call left a mask of another scan under this name.
            if mask in missing:
                raise UserError(missing[mask])
        for path in (*patient.masks, *(image for image in patient.images if image is not None)):
            if not path.is_file():
                raise UserError(f"{patient.patient}: {path.name}: no such file")
        inputs = _fingerprint(patient)
        known = ledger.read(patient.patient, inputs)
        # The ledger's entry alone is not enough: somebody may have removed the patient's folder.
        if known is not None and (folder / "follow.json").is_file():
            return known
        own = argparse.Namespace(**{**vars(args), "out": folder})
        follow_scans(own, list(patient.masks), list(patient.images), list(patient.dates))
        content = json.loads((folder / "follow.json").read_text(encoding="utf-8"))
    except Exception as error:  # the other patients continue
        message = format_failure(patient.patient, error)
        ledger.write_failure(patient.patient, message, inputs)
        if isinstance(error, UserError):
            raise UserError(message) from error
        raise RunFailed(message) from error
    page = f"patients/{quote(folder.name)}/follow.html"
    row = summarise_patient(patient.patient, content, page)
    ledger.write(patient.patient, row, inputs)
    return row


def _fingerprint(patient: PatientScans) -> str:
    # Contents, not dates of files: a copied table with the same masks is not computed again.
    files = [file_sha256(mask) for mask in patient.masks]
    images = [None if image is None else file_sha256(image) for image in patient.images]
    dates = [date.isoformat() for date in patient.dates]
    return fingerprint_of({"masks": files, "images": images, "dates": dates})


def _write_cohort(
    args: argparse.Namespace, rows: list[dict[str, Any]], failures: dict[str, str]
) -> None:
    # The JSON is removed first and written last, so that it never describes files of an earlier
    # call.
    (args.out / "cohort.json").unlink(missing_ok=True)
    write_text(args.out / "cohort.csv", cohort_csv(rows, failures))
    title = f"Cohort, {args.out.resolve().name}"
    write_text(args.out / "cohort.html", render_cohort(title, rows, failures))
    write_json(args.out / "cohort.json", {"schema": 1, "patients": rows, "failed": failures})
