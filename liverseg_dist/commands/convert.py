"""Clean CT scans and write them as one Zarr store. The same as tools/to_zarr.

  tools/to_zarr Task03_Liver store.zarr
  tools/to_zarr Task03_Liver store.zarr --dry-run                       audit only, nothing is written
  tools/to_zarr Task03_Liver store.zarr convert.cleaning.spacing_mm=[3,1.5,1.5]
  tools/to_zarr Task03_Liver store.zarr --shard 2/8                     one task of a SLURM array of 8 (numbers 0 to 7)

SRC is a folder in the layout of the Medical Segmentation Decathlon: dataset.json, imagesTr, labelsTr, imagesTs.
Run again after an interruption: what is whole and unchanged is kept, only the rest is converted.
Memory: about 1.2 GiB a worker for a 512 x 512 x 700 scan; convert.workers=N bounds their number.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from liverseg_dist.commands.options import add_settings, settings_from
from liverseg_dist.data.conversion.case import CaseRecord
from liverseg_dist.data.conversion.pipeline import Conversion, audit_of, run_jobs
from liverseg_dist.data.msd import read_dataset
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, UserError
from liverseg_dist.tracking.progress import progress

COLOURS = {"kept": "green", "repaired": "yellow", "unlabelled": "cyan", "excluded": "red", "quarantined": "bold red"}
SHADES = {"error": "red", "warning": "yellow", "info": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SRC", help="folder with dataset.json, imagesTr, labelsTr")
    parser.add_argument("store", type=Path, metavar="DST", help="the store: a new folder, or one to continue")
    parser.add_argument("--dry-run", action="store_true", help="audit every case and print it; write nothing")
    parser.add_argument("--force", action="store_true", help="convert again a store that was made with other settings")
    parser.add_argument("--shard", metavar="I/N", help="convert only every N-th case from number I on (from 0)")
    add_settings(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_from(args)
    dataset = read_dataset(args.source)
    conversion = Conversion(dataset, args.store, settings.convert)
    jobs = conversion.jobs(audit_only=args.dry_run)
    if not jobs:
        raise UserError(f"{args.source}: the data set names no case")
    if args.shard:
        number, total = _shard(args.shard)
        jobs = sorted(jobs, key=lambda job: job.case.case_id)[number::total]
    if not args.dry_run:
        conversion.open(force=args.force)
    made = 0
    with progress("audit" if args.dry_run else "convert", len(jobs)) as line:

        def done(record: CaseRecord, fresh: bool) -> None:
            nonlocal made
            made += fresh
            line.advance(note=f"{record.case_id} {record.status}")

        records = run_jobs(jobs, settings.convert.workers, done)
    for note in dataset.notes:
        print(f"{note.severity}: {note.message}")
    _print_table(records)
    finished = None if args.dry_run else conversion.finish()
    return _result(args, finished or records, made, finished is not None)


def _result(args: argparse.Namespace, records: list[CaseRecord], made: int, finished: bool) -> dict[str, Any]:
    counts = Counter(record.status for record in records)
    quarantined = [record.case_id for record in records if record.status == "quarantined"]
    said = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
    if args.dry_run:
        print(f"audit of {len(records)} scans: {said}; nothing was written")
    elif finished:
        stored = sum(len(record.slabs) for record in records)
        print(f"{args.store}: {stored} cases stored ({made} scans converted now), {said}; look at {args.store}/audit.html")
    else:
        print(f"{args.store}: this shard is done, {said}; the store opens when every shard is")
    if quarantined:
        print(f"liverseg: could not be read: {', '.join(quarantined)}; the rest is done", file=sys.stderr)
    return {
        "store": str(args.store),
        "finished": finished,
        "converted": made,
        "counts": dict(counts),
        "audit": audit_of(records),
        "exit_code": EXIT_FAILED if quarantined else EXIT_DONE,
    }


def _print_table(records: list[CaseRecord]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("case", "status", "voxels z y x", "spacing mm", "axes"):
        table.add_column(heading, no_wrap=True)
    table.add_column("what was found, and done", overflow="fold", min_width=40)
    for record in sorted(records, key=lambda r: r.case_id):
        facts = record.facts
        shape = " x ".join(map(str, facts.get("shape_zyx", [])))
        spacing = " x ".join(f"{s:.2f}" for s in facts.get("spacing_mm", []))
        says = [f"[{SHADES[f['severity']]}]{escape(f['message'])}[/]" for f in record.findings]
        status = f"[{COLOURS[record.status]}]{record.status}[/]"
        table.add_row(escape(record.case_id), status, shape, spacing, facts.get("orientation", ""), "\n".join(says))
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard {text}: is written I/N with I from 0 to N-1, e.g. 0/8")
    return int(match[1]), int(match[2])
