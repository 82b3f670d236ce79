"""Clean CT or MR scans and write them as one Zarr store. The same as tools/to_zarr.

  tools/to_zarr Task03_Liver store.zarr --config configs/task03_S.yaml  the config file of the later training
  tools/to_zarr Task03_Liver store.zarr --dry-run                       audit only, nothing is written
  tools/to_zarr Task03_Liver store.zarr convert.cleaning.spacing_mm=[3,1.5,1.5]
  tools/to_zarr Task03_Liver store.zarr --splits nnunet                 nnU-Net's five folds, no test set
  tools/to_zarr nnUNet_raw/Dataset003_Liver store.zarr --splits splits_final.json
  tools/to_zarr Task03_Liver store.zarr --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT     sbatch --array=0-7
  tools/to_zarr Task03_Liver AMOS store.zarr                            join data sets; labels join by their names
  tools/to_zarr AMOS store.zarr 'convert.labels={liver: , kidneys: [right kidney, left kidney], "*": drop}'
  tools/to_zarr Task03_Liver store.zarr --executor ray                  Ray cluster of this node (or RAY_ADDRESS)
  tools/to_zarr Task03_Liver store.zarr convert.cleaning.missing_label=impute convert.labels_from=runs/first
                                                                        predict missing labels, for training only

SRC is a folder in the layout of the Medical Segmentation Decathlon: dataset.json, imagesTr, labelsTr, imagesTs;
or has one folder per case with ct.nii.gz and segmentations/STRUCTURE.nii.gz. dataset.json names the labels;
convert.labels renames, merges and drops them (data/README.md).
Several channels (CT with MR, phases): modality or channel_names in dataset.json names them; they are read from 4D
files, or from case_0000.nii.gz, case_0001.nii.gz, ... Other names and normalisations: convert.channels in a config
file, a list of {name, modality: CT|MR|other, intensity: ct|zscore|percentiles|range}.
Run the same line again after an interruption: complete and unchanged cases are kept. The store can be opened when
all cases are converted; DST/audit.html shows every case. Exit code 1: a scan could not be read; the rest is done.
Memory: one scan per worker, 1 GiB for 512 x 512 x 700 voxels; convert.workers=N limits the number of workers.
"""

import argparse
import logging
import math
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from liverseg_dist.commands.dicom_options import add_dicom, dicom_options
from liverseg_dist.commands.options import add_settings, settings_from
from liverseg_dist.config import ConvertConfig, SplitConfig
from liverseg_dist.console import write_error, write_lines
from liverseg_dist.data.audit.audit_page import describe_intensities
from liverseg_dist.data.conversion.case_records import CaseJob, CaseRecord, Labeller
from liverseg_dist.data.conversion.convert_dataset import Conversion, run_jobs
from liverseg_dist.data.conversion.executors import EXECUTORS
from liverseg_dist.data.conversion.root_metadata import collect_audit
from liverseg_dist.data.io.join_datasets import read_datasets
from liverseg_dist.data.io.spacing_table import describe_unmatched
from liverseg_dist.data.label_mapping import describe_classes
from liverseg_dist.data.preprocessing.slab_coverage import describe_coverage
from liverseg_dist.data.splits import Splits, check_split_files, find_divided_patients
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, UserError, printable
from liverseg_dist.files import natural_key
from liverseg_dist.inference.label_imputation import RunLabeller
from liverseg_dist.labels import LITS_SCHEME
from liverseg_dist.texts.names import list_some
from liverseg_dist.texts.paths import expand_path, path_argument
from liverseg_dist.tracking.progress import show_progress
from liverseg_dist.tracking.terminal_table import print_table

_logger = logging.getLogger(__name__)
STATUS_STYLES = {
    "kept": "green",
    "repaired": "yellow",
    "imputed": "yellow",
    "unlabelled": "cyan",
    "excluded": "red",
    "quarantined": "bold red",
}
SEVERITY_STYLES = {"error": "red", "warning": "yellow", "info": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=path_argument,
        metavar="SRC",
        help="folder with dataset.json, imagesTr, labelsTr, or with one folder per case; several "
        "folders before DST are joined by the names of their structures",
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
        help="convert a store again that was made with other settings",
    )
    parser.add_argument(
        "--shard", metavar="I/N", help="convert every N-th scan, starting at number I (from 0)"
    )
    parser.add_argument(
        "--executor",
        choices=sorted(EXECUTORS),
        default="process",
        help="process: this machine (default); ray: a Ray cluster",
    )
    parser.add_argument(
        "--splits",
        metavar="HOW",
        help="stratified (default), nnunet (five folds), or a JSON file; sets convert.splits.kind "
        "and convert.splits.file",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="device for convert.labels_from (default: cpu)",
    )
    add_dicom(parser)
    add_settings(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    sources = _split_positionals(args)
    args.overrides += _splits_overrides(args.splits)
    settings = settings_from(args)
    dataset = read_datasets(sources, settings.convert.channels, dicom_options(args))
    conversion = Conversion(
        dataset, args.store, settings.convert, _build_labeller(settings.convert, args.device)
    )
    if conversion.labeller is not None:
        # Labels of another scheme would be written into the store as if they were the data set's
        # own; that must fail before the first scan is read, which may take hours.
        _check_run_labels(conversion, conversion.labeller)
    jobs = conversion.jobs(audit_only=args.dry_run)
    if not jobs:
        raise UserError(f"{', '.join(map(str, sources))}: the data set names no case")
    if args.shard:
        number, total = _parse_shard(args.shard)
        # Sorted by name, because the order in dataset.json may differ between copies of a data
        # set: all array tasks must divide the same list.
        jobs = sorted(jobs, key=lambda job: job.case.case_id)[number::total]
    _warn_of_unused_splits(settings.convert.splits)
    ids = [case.case_id for case in (*dataset.training, *dataset.test)]
    # A split file that names unknown cases is noticed now, not after hours of conversion.
    check_split_files(settings.convert.splits, ids)
    table = settings.convert.cleaning.spacing_table
    if table is not None:
        for line in describe_unmatched(table, ids):
            _logger.warning("%s", line)
    if args.dry_run:
        # The lock of the store is not taken: a dry run may look at a data set while a conversion
        # runs.
        records, processed = _run_jobs(jobs, args.executor, settings.convert.workers, "audit")
        _print_findings(conversion, records)
        return _report_result(args, records, processed, finished=False)
    with conversion.opened(force=args.force):
        records, processed = _run_jobs(jobs, args.executor, settings.convert.workers, "convert")
        _print_findings(conversion, records)
        # Splits and the root metadata need all cases, so only the call that finds the last shard
        # complete writes them.
        all_records = conversion.finish()
    if all_records is not None:
        _print_store(CaseStore.open(args.store))
    return _report_result(args, all_records or records, processed, finished=all_records is not None)


def _split_positionals(args: argparse.Namespace) -> list[Path]:
    """The sources of `SRC [SRC ...] DST [KEY=VALUE ...]`; sets `args.store` and `args.overrides`.

    argparse takes the second path for the store, and all further ones for settings.
    """
    # The number of sources varies, so argparse cannot find the store by its position.
    paths = [args.source, args.store]
    overrides = []
    for text in args.overrides:
        if "=" in text:
            overrides.append(text)
        else:
            paths.append(path_argument(text))
    *sources, args.store = paths
    args.overrides = overrides
    return sources


def _warn_of_unused_splits(splits: SplitConfig) -> None:
    if splits.kind == "stratified":
        return
    # Only settings that were given: the defaults must not cause a warning.
    unused = sorted({"folds", "test_fraction"} & splits.model_fields_set)
    if unused:
        names = ", ".join(f"convert.splits.{key}" for key in unused)
        _logger.warning("%s change nothing with convert.splits.kind=%s", names, splits.kind)


def _run_jobs(
    jobs: list[CaseJob], executor: str, workers: int, verb: str
) -> tuple[list[CaseRecord], int]:
    """Run the jobs with a progress line.

    Returns:
        (records of all scans, number of scans processed by this call).
    """
    processed = voxels = 0
    start_s = time.monotonic()
    with show_progress(verb, len(jobs)) as line:

        def report_case(record: CaseRecord, is_new: bool) -> None:
            nonlocal processed, voxels
            processed += is_new
            # Scans of an earlier call cost no time, so they do not count for the speed.
            voxels += is_new * math.prod(record.facts.get("shape_zyx", [0]))
            speed = voxels / 1e6 / max(1e-3, time.monotonic() - start_s)
            line.advance(
                note=f"{speed:.1f} M voxels/s  {record.case_id} {record.status if is_new else 'unchanged'}"
            )

        return run_jobs(jobs, workers, report_case, EXECUTORS[executor]), processed


def _report_result(
    args: argparse.Namespace, records: list[CaseRecord], processed: int, finished: bool
) -> dict[str, Any]:
    counts = Counter(record.status for record in records)
    quarantined = sorted((r.case_id for r in records if r.status == "quarantined"), key=natural_key)
    summary = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
    if args.dry_run:
        line = f"audit of {len(records)} scans: {summary}; nothing was written"
    elif finished:
        stored = sum(len(record.slabs) for record in records)
        line = (
            f"{args.store}: {stored} cases stored ({processed} scans converted now), {summary}; "
            f"see {args.store}/audit.html"
        )
    else:
        line = (
            f"{args.store}: this shard is done ({processed} scans converted now), {summary}; "
            "other shards are not"
        )
    write_lines(line)
    if quarantined:
        write_error(f"could not be converted: {', '.join(quarantined)}; the rest is done")
    return {
        "store": str(args.store),
        "finished": finished,
        "converted": processed,
        "counts": dict(counts),
        "audit": collect_audit(records),
        "exit_code": EXIT_FAILED if quarantined else EXIT_DONE,
    }


def _print_store(store: CaseStore) -> None:
    splits = Splits(store.ids("test"), tuple(tuple(fold) for fold in store.root["splits"]["folds"]))
    fold_sizes = ", ".join(str(len(fold)) for fold in splits.folds)
    lines = [f"splits: {len(splits.test)} test, folds of {fold_sizes}"]
    patients = {case_id: store.meta(case_id).patient for case_id in store.case_ids}
    for patient in find_divided_patients(splits, patients):
        # On stdout: the audit page names them, too, so they are part of the result.
        lines.append(
            f"warning: scans of the patient of {patient} are in several parts of the split"
        )
    lines += _describe_labels(store)
    lines += describe_intensities(store.root)
    coverage = store.root["coverage"]
    if coverage:
        lines.append(f"slabs hold {describe_coverage(coverage, store.labels)}")
    write_lines(*lines)


def _describe_labels(store: CaseStore) -> list[str]:
    """Class values of a store with other labels than LiTS, and which are annotated in part."""
    labels = store.labels
    lines = []
    if labels != LITS_SCHEME:
        lines.append(f"labels: {describe_classes(labels)}")
    counts = Counter(name for case_id in store.case_ids for name in store.meta(case_id).annotated)
    labelled = sum(store.meta(case_id).labelled for case_id in store.case_ids)
    # Unlabelled cases are left out of the count: none of their structures is annotated.
    partly = [name for name in labels.structure_names if counts[name] < labelled]
    if partly:
        shown = [f"{printable(name)} in {counts[name]}" for name in partly]
        lines.append(f"annotated in part, of {labelled} labelled cases: {list_some(shown, 20)}")
    return lines


def _print_findings(conversion: Conversion, records: list[CaseRecord]) -> None:
    lines = []
    for note in conversion.dataset.notes:
        # The settings say what unnamed labels are.
        if note.code == "labels_unnamed" and conversion.convert.labels is not None:
            continue
        # An error at this point was allowed by a setting, such as convert.modality=any.
        severity = "warning" if note.severity == "error" else note.severity
        lines.append(f"{severity}: {note.message}")
    write_lines(*lines)
    _print_table(records)


def _print_table(records: list[CaseRecord]) -> None:
    """Print one row per scan; findings fold on a narrow terminal."""
    audit = collect_audit(records)
    rows = []
    for record in sorted(records, key=lambda record: natural_key(record.case_id)):
        facts = record.facts
        shape = " x ".join(map(str, facts.get("shape_zyx", [])))
        spacing = " x ".join(f"{s:.2f}" for s in facts.get("spacing_mm", []))
        findings = audit[record.case_id]["findings"]
        # Rich text, not markup: a message may contain square brackets, such as a setting of a
        # list.
        messages = [Text(f["message"], style=SEVERITY_STYLES[f["severity"]]) for f in findings]
        status = Text(record.status, style=STATUS_STYLES[record.status])
        found = Text("\n").join(messages)
        rows.append((record.case_id, status, shape, spacing, facts.get("orientation", ""), found))
    print_table(
        ("case", "status", "voxels z y x", "spacing mm", "axes", "findings and repairs"), rows
    )


def _build_labeller(convert: ConvertConfig, device: str) -> RunLabeller | None:
    if convert.labels_from is None:
        if convert.cleaning.missing_label == "impute":
            raise UserError(
                "convert.cleaning.missing_label=impute needs convert.labels_from=RUN, the folder of a finished run"
            )
        return None
    if convert.cleaning.missing_label == "exclude":
        raise UserError(
            "convert.labels_from needs convert.cleaning.missing_label=impute or unlabelled; set one of them"
        )
    # Checked here and not by argparse, because importing torch for --help would take seconds.
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; omit the option to label on the CPU")
    return RunLabeller.from_run(convert.labels_from, device)


def _check_run_labels(conversion: Conversion, labeller: Labeller) -> None:
    """Raises `UserError` if the run labels other structures than those of the store."""
    wanted = conversion.label_plan.scheme
    if labeller.labels != wanted:
        raise UserError(
            f"{conversion.convert.labels_from}: labels {describe_classes(labeller.labels)}; the "
            f"store has {describe_classes(wanted)}; convert.labels must describe those of the run"
        )


def _splits_overrides(how: str | None) -> list[str]:
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


def _parse_shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    # The I-th of N shards has the numbers of SLURM array tasks, which begin at 0.
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard {text}: must be I/N with I from 0 to N-1, e.g. 0/8")
    return int(match[1]), int(match[2])
