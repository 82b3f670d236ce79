"""Clean CT scans and write them as one Zarr store. The same as tools/to_zarr.

  tools/to_zarr Task03_Liver store.zarr --config configs/task03_S.yaml  with the file that the run will be given
  tools/to_zarr Task03_Liver store.zarr --dry-run                       audit only, nothing is written
  tools/to_zarr Task03_Liver store.zarr convert.cleaning.spacing_mm=[3,1.5,1.5]
  tools/to_zarr Task03_Liver store.zarr --splits nnunet                 its five folds, no test set
  tools/to_zarr nnUNet_raw/Dataset003_Liver store.zarr --splits splits_final.json
  tools/to_zarr Task03_Liver store.zarr --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT     sbatch --array=0-7
  tools/to_zarr Task03_Liver store.zarr --executor ray                  on the Ray cluster of this node (or RAY_ADDRESS)
  tools/to_zarr Task03_Liver store.zarr convert.cleaning.missing_label=impute convert.labels_from=runs/first
                                                                        label what has no label; for training only

SRC is a folder in the layout of the Medical Segmentation Decathlon: dataset.json, imagesTr, labelsTr, imagesTs.
Run again after an interruption: what is whole and unchanged is kept, only the rest is converted. The store opens when
all of it is there; DST/audit.html shows what went in. Exit code 1: some scan could not be read; the rest is done.
Memory: one scan per worker, 1 GiB for 512 x 512 x 700 voxels; convert.workers=N bounds their number.
"""

import argparse
import math
import re
import sys
import time
from collections import Counter
from typing import Any

import torch
from rich.text import Text

from liverseg_dist.commands.options import add_settings, settings_from
from liverseg_dist.config import ConvertConfig
from liverseg_dist.data.conversion.case_records import CaseJob, CaseRecord
from liverseg_dist.data.conversion.convert_dataset import Conversion, run_jobs
from liverseg_dist.data.conversion.executors import EXECUTORS
from liverseg_dist.data.conversion.root_metadata import collect_audit
from liverseg_dist.data.io.dataset_index import DatasetIndex, read_dataset
from liverseg_dist.data.io.modality import refuse_other_modality
from liverseg_dist.data.io.spacing_table import describe_unmatched
from liverseg_dist.data.splits import Splits, check_split_files, find_divided_patients
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, UserError
from liverseg_dist.files import natural_key
from liverseg_dist.inference.label_imputation import RunLabeller
from liverseg_dist.texts.paths import expand_path, path_argument
from liverseg_dist.tracking.progress import show_progress
from liverseg_dist.tracking.terminal_table import print_table

COLOURS = {
    "kept": "green",
    "repaired": "yellow",
    "imputed": "yellow",
    "unlabelled": "cyan",
    "excluded": "red",
    "quarantined": "bold red",
}
SHADES = {"error": "red", "warning": "yellow", "info": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=path_argument,
        metavar="SRC",
        help="folder with dataset.json, imagesTr, labelsTr",
    )
    parser.add_argument(
        "store",
        type=path_argument,
        metavar="DST",
        help="the store: a new folder, or one to continue",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="audit every case and print it; write nothing"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="convert again a store that was made with other settings",
    )
    parser.add_argument(
        "--shard", metavar="I/N", help="convert only every N-th scan from number I on (from 0)"
    )
    parser.add_argument(
        "--executor",
        choices=sorted(EXECUTORS),
        default="process",
        help="process: this machine (default); ray: a cluster",
    )
    parser.add_argument(
        "--splits",
        metavar="HOW",
        help="stratified (default), nnunet (its five folds), or your JSON; short for convert.splits.kind and .file",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where convert.labels_from computes (default: cpu)",
    )
    add_settings(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    args.overrides += _splits(args.splits)
    settings = settings_from(args)
    dataset = read_dataset(args.source)
    refuse_other_modality(args.source, dataset.notes, settings.convert.modality)
    conversion = Conversion(
        dataset, args.store, settings.convert, _labeller(settings.convert, args.device)
    )
    jobs = conversion.jobs(audit_only=args.dry_run)
    if not jobs:
        raise UserError(f"{args.source}: the data set names no case")
    if args.shard:
        number, total = _shard(args.shard)
        jobs = sorted(jobs, key=lambda job: job.case.case_id)[number::total]
    splits = settings.convert.splits
    if (
        idle := sorted({"folds", "test_fraction"} & splits.model_fields_set)
        if splits.kind != "stratified"
        else []
    ):
        names = ", ".join(f"convert.splits.{key}" for key in idle)
        print(
            f"warning: {names} change nothing with convert.splits.kind={splits.kind}",
            file=sys.stderr,
        )
    ids = [case.case_id for case in (*dataset.training, *dataset.test)]
    check_split_files(settings.convert.splits, ids)
    table = settings.convert.cleaning.spacing_table
    for line in [] if table is None else describe_unmatched(table, ids):
        print(f"warning: {line}", file=sys.stderr)
    if args.dry_run:
        records, made = _convert(jobs, args.executor, settings.convert.workers, "audit")
        _print_findings(dataset, records)
        return _result(args, records, made, finished=False)
    with conversion.opened(force=args.force):
        records, made = _convert(jobs, args.executor, settings.convert.workers, "convert")
        _print_findings(dataset, records)
        all_records = conversion.finish()
    if all_records is not None:
        _print_store(CaseStore.open(args.store))
    return _result(args, all_records or records, made, finished=all_records is not None)


def _convert(
    jobs: list[CaseJob], executor: str, workers: int, verb: str
) -> tuple[list[CaseRecord], int]:
    """Records, and how many were made now."""
    made = voxels = 0
    begun = time.monotonic()
    with show_progress(verb, len(jobs)) as line:

        def done(record: CaseRecord, fresh: bool) -> None:
            nonlocal made, voxels
            made += fresh
            voxels += fresh * math.prod(record.facts.get("shape_zyx", [0]))
            speed = voxels / 1e6 / max(1e-3, time.monotonic() - begun)
            line.advance(
                note=f"{speed:.1f} M voxels/s  {record.case_id} {record.status if fresh else 'unchanged'}"
            )

        return run_jobs(jobs, workers, done, EXECUTORS[executor]), made


def _result(
    args: argparse.Namespace, records: list[CaseRecord], made: int, finished: bool
) -> dict[str, Any]:
    counts = Counter(record.status for record in records)
    quarantined = sorted((r.case_id for r in records if r.status == "quarantined"), key=natural_key)
    said = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
    if args.dry_run:
        print(f"audit of {len(records)} scans: {said}; nothing was written")
    elif finished:
        stored = sum(len(record.slabs) for record in records)
        print(
            f"{args.store}: {stored} cases stored ({made} scans converted now), {said}; see {args.store}/audit.html"
        )
    else:
        print(
            f"{args.store}: this shard is done ({made} scans converted now), {said}; others are not yet"
        )
    if quarantined:
        print(
            f"liverseg: could not be converted: {', '.join(quarantined)}; the rest is done",
            file=sys.stderr,
        )
    return {
        "store": str(args.store),
        "finished": finished,
        "converted": made,
        "counts": dict(counts),
        "audit": collect_audit(records),
        "exit_code": EXIT_FAILED if quarantined else EXIT_DONE,
    }


def _print_store(store: CaseStore) -> None:
    splits = Splits(store.ids("test"), tuple(tuple(fold) for fold in store.root["splits"]["folds"]))
    print(
        f"splits: {len(splits.test)} test, folds of {', '.join(str(len(fold)) for fold in splits.folds)}"
    )
    patients = {case_id: store.meta(case_id).patient for case_id in store.case_ids}
    for patient in find_divided_patients(splits, patients):
        print(f"warning: scans of the patient of {patient} stand in several parts of the split")
    hu = store.intensity
    print(
        f"intensity: {hu.lower_hu:g} to {hu.upper_hu:g} HU becomes 0 to 1, then (v - {hu.mean:.4f}) / {hu.std:.4f}"
    )
    lost = store.root["coverage"]
    if lost:
        print(
            f"slabs hold {100 * lost['liver_inside']:.2f} % of the labelled liver, {100 * lost['tumour_inside']:.2f} % "
            f"of tumour; of {lost['tumours']} tumours {lost['tumours_cut']} cut, {lost['tumours_missed']} missed, "
            f"{lost['tumours_vanished']} too small for the slab's voxels"
        )


def _print_findings(dataset: DatasetIndex, records: list[CaseRecord]) -> None:
    for (
        note
    ) in dataset.notes:  # an error here was allowed by a setting, such as convert.modality=any
        print(f"{'warning' if note.severity == 'error' else note.severity}: {note.message}")
    _print_table(records)


def _print_table(records: list[CaseRecord]) -> None:
    """One row per scan; where the terminal is narrow the findings fold."""
    audit = collect_audit(records)
    rows = []
    for record in sorted(records, key=lambda record: natural_key(record.case_id)):
        facts = record.facts
        shape = " x ".join(map(str, facts.get("shape_zyx", [])))
        spacing = " x ".join(f"{s:.2f}" for s in facts.get("spacing_mm", []))
        findings = audit[record.case_id]["findings"]
        messages = [Text(f["message"], style=SHADES[f["severity"]]) for f in findings]
        status = Text(record.status, style=COLOURS[record.status])
        found = Text("\n").join(messages)
        rows.append((record.case_id, status, shape, spacing, facts.get("orientation", ""), found))
    print_table(
        ("case", "status", "voxels z y x", "spacing mm", "axes", "findings and repairs"), rows
    )


def _labeller(convert: ConvertConfig, device: str) -> RunLabeller | None:
    if convert.labels_from is None:
        if convert.cleaning.missing_label == "impute":
            raise UserError(
                "convert.cleaning.missing_label=impute needs convert.labels_from=RUN, a finished run's folder"
            )
        return None
    if convert.cleaning.missing_label == "exclude":
        raise UserError(
            "convert.labels_from is for convert.cleaning.missing_label=impute or unlabelled; set one of them"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: no GPU that torch can use; leave it out to label on the CPU"
        )
    return RunLabeller.from_run(convert.labels_from, device)


def _splits(how: str | None) -> list[str]:
    if how is None:
        return []
    if how in ("stratified", "nnunet"):
        return [f"convert.splits.kind={how}"]
    try:
        file = expand_path(how)
    except ValueError as error:
        raise UserError(f"--splits {how}: {error}") from None
    if not file.is_file():
        raise UserError(f"--splits {how}: neither stratified nor nnunet, and no such file")
    return ["convert.splits.kind=file", f"convert.splits.file={file}"]


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard {text}: is written I/N with I from 0 to N-1, e.g. 0/8")
    return int(match[1]), int(match[2])
