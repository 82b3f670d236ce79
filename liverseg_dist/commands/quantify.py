"""Measure masks: volume, burden, and for each lesion its diameters, shape, place and values.

  liverseg quantify labelsTr/ --images imagesTr/ --out quantities/
  liverseg quantify runs/first/evaluation --out quantities/        masks of evaluate --save-masks
  liverseg quantify imagesTs/ --run runs/first --out quantities/   segments the scans first
  liverseg quantify masks/ --labels amos/dataset.json --out quantities/
  liverseg quantify masks/ --labels liver=6,7 --labels tumour:lesion=7 --out quantities/
  torchrun --rdzv-backend=liverseg --rdzv-endpoint=localhost:0 --nproc-per-node=4 \\
      -m liverseg_dist quantify masks/ --out quantities/

Writes lesions.csv, structures.csv, quantities.json and quantities.html with each lesion drawn.
Lesions are connected components; the long axis is the longest axial diameter, the short axis its
perpendicular: with slices of 1 mm within 0.1 mm on average (0.5 mm at most), with slices of 5 mm
0.2 mm too short on average (1.7 mm at most). What the scan cuts is marked and its volume is a lower
bound. Without --labels, the dataset.json beside or above the masks states what the values mean, else
they are Task03_Liver's.
Run the same line again after a stop: cases that are measured are kept.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from liverseg_dist.clinical.components import CONNECTIVITIES, LITS_CONNECTIVITY
from liverseg_dist.clinical.page import render_quantities
from liverseg_dist.clinical.tables import lesions_csv, structures_csv
from liverseg_dist.commands.dicom_options import add_dicom, dicom_options
from liverseg_dist.commands.options import add_channels, add_inference
from liverseg_dist.commands.predict import load_prediction
from liverseg_dist.commands.run_distributed import report_case_failure, run_distributed
from liverseg_dist.commands.segment_scans import segment_scans
from liverseg_dist.console import write_lines, write_notes
from liverseg_dist.distributed.collectives import barrier, gather_from_ranks
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.rank_zero import share_from_rank0
from liverseg_dist.distributed.startup import start_rank
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER, RunFailed, UserError
from liverseg_dist.files import write_json, write_text
from liverseg_dist.inference.malloc_settings import keep_freed_memory
from liverseg_dist.inference.predict_scans import ScanPredictor
from liverseg_dist.inference.quantify import (
    MaskFile,
    Measurement,
    find_masks,
    find_scheme,
    gather_inputs,
    measurement_for,
)
from liverseg_dist.inference.scan_files import ScanFiles
from liverseg_dist.inference.work_division import shard_cases
from liverseg_dist.label_scheme import parse_label_options
from liverseg_dist.labels import LabelScheme
from liverseg_dist.texts.paths import expand_user_path, path_argument
from liverseg_dist.tracking.progress import show_progress

SCHEMA = 1
# Thousands of cases fill a terminal; the tables have all of them.
MAX_CASES_SHOWN = 50
Failures = dict[str, tuple[str, bool]]
"""Case -> why it failed, and whether that was the user's mistake."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="MASK",
        help="masks (.nii, .nii.gz), folders of them, a run's evaluation; with --run: scans, then inference.KEY=VALUE",
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="folder for the results"
    )
    parser.add_argument(
        "--images",
        type=path_argument,
        metavar="DIR",
        help="scans of the masks, by name, for values and pictures; NIfTI or DICOM",
    )
    parser.add_argument(
        "--run",
        type=path_argument,
        metavar="RUN",
        help="segment the given scans with this run first",
    )
    add_labels(parser)
    parser.add_argument(
        "--connectivity",
        type=int,
        choices=CONNECTIVITIES,
        default=LITS_CONNECTIVITY,
        help="neighbours that make one lesion: 6 faces (as LiTS, the default), 18 and edges, 26 and corners",
    )
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="with --run: also write probabilities, which give the range of possible volumes",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="with --run: also segment scans that the audit refuses, and mark them",
    )
    add_channels(parser)
    add_dicom(parser)
    add_inference(parser)


def add_labels(parser: argparse.ArgumentParser) -> None:
    """`--labels`, for every command that reads masks of any scheme."""
    parser.add_argument(
        "--labels",
        action="append",
        default=[],
        metavar="dataset.json|NAME=VALUES",
        help="what the values of the masks mean: a dataset.json, or repeated NAME=1,2 (NAME:lesion=2 states the kind)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    world = start_rank(args.device)
    # Measurements must not depend on the number of threads.
    torch.set_num_threads(1)
    keep_freed_memory()
    overrides = [text for text in args.inputs if "=" in text and not Path(text).exists()]
    paths = [expand_user_path(text) for text in args.inputs if text not in overrides]
    if args.run is None:
        if overrides:
            raise UserError(f"{overrides[0]}: settings of inference need --run")
        masks = find_masks(paths)
        scheme = parse_label_options(args.labels) if args.labels else find_scheme(masks)
        cases = gather_inputs(masks, args.images, scheme, dicom_options(args))
        return _measure_together(args, cases, scheme, world)
    return _segment_and_measure(args, paths, overrides, world)


def _measure_together(
    args: argparse.Namespace, cases: list[MaskFile], scheme: LabelScheme, world: World
) -> dict[str, Any]:
    def work(watch: HeartbeatMonitor) -> dict[str, Any]:
        return measure_cases(args, cases, scheme, world, watch, {})

    return run_distributed(world, args.timeout, args.out, work)


def _segment_and_measure(
    args: argparse.Namespace, paths: list[Path], overrides: list[str], world: World
) -> dict[str, Any]:
    """Segment scans into OUT/masks, then measure those masks with the scans as images."""
    if args.images is not None:
        raise UserError("--images: with --run the given scans are the images")
    settings = argparse.Namespace(**{**vars(args), "out": args.out / "masks"})
    job, scans = load_prediction(settings, overrides, paths, world)
    scheme = parse_label_options(args.labels) if args.labels else job.labels

    def work(watch: HeartbeatMonitor) -> dict[str, Any]:
        failed = segment_scans(job, scans, world, watch)
        watch.report_progress(-1, "waiting for the masks of other ranks")
        barrier()
        segmented = [scan for scan in scans if scan.scan_id not in failed]
        cases = [_case_of_scan(job, scan, args.probabilities, scheme) for scan in segmented]
        # The reasons are in the ledger, because another rank may have met them.
        errors = job.ledger.failures()
        failures = {
            name: (errors.get(name, "could not be segmented"), mistake)
            for name, mistake in failed.items()
        }
        return measure_cases(args, cases, scheme, world, watch, failures)

    return run_distributed(world, args.timeout, args.out, work)


def _case_of_scan(
    job: ScanPredictor, scan: ScanFiles, with_probabilities: bool, scheme: LabelScheme
) -> MaskFile:
    name = scan.scan_id
    probabilities = {}
    if with_probabilities:
        for structure in scheme.structures:
            # A structure without a file, such as one the run does not predict, has no interval.
            found = job.get_probability_file(name, structure.name)
            if found.is_file():
                probabilities[structure.name] = found
    first, *further = scan.files if scan.files[0] is not None else scan.paths
    return MaskFile(name, job.get_mask_file(name), first, probabilities, tuple(further))


def measure_cases(
    args: argparse.Namespace,
    cases: list[MaskFile],
    scheme: LabelScheme,
    world: World,
    watch: HeartbeatMonitor,
    failures: Failures,
) -> dict[str, Any]:
    """Measure this rank's share, then write the tables and the page on rank 0."""
    job = measurement_for(args.out, scheme, args.connectivity)
    records, failed, reused = _measure_share(job, cases, world, watch)
    watch.report_progress(-1, "waiting for the cases of other ranks")
    parts = gather_from_ranks((records, failed, reused))
    records = {name: record for part in parts for name, record in part[0].items()}
    failures = failures | {name: failure for part in parts for name, failure in part[1].items()}
    ordered = [records[case.case] for case in cases if case.case in records]
    if not ordered:
        reason = next((text for text, _ in failures.values()), "no case is left")
        all_mistakes = all(mistake for _, mistake in failures.values())
        error = UserError if all_mistakes else RunFailed
        raise error(f"none of {len(failures)} cases could be measured; the first: {reason}")
    reasons = {name: text for name, (text, _) in failures.items()}
    share_from_rank0(lambda: _write_results(args, job, ordered, reasons, scheme))
    return _result(args, ordered, failures, sum(part[2] for part in parts), world)


def _measure_share(
    job: Measurement, cases: list[MaskFile], world: World, watch: HeartbeatMonitor
) -> tuple[dict[str, dict[str, Any]], Failures, int]:
    by_name = {case.case: case for case in cases}
    sizes = {case.case: case.mask.stat().st_size for case in cases}
    # The size of the file stands for the time; opening each mask would be slow for thousands.
    mine = shard_cases(sizes, world.global_rank, world.world_size)
    records: dict[str, dict[str, Any]] = {}
    failed: Failures = {}
    reused = 0
    with show_progress("quantify", len(mine)) as line:
        for name in mine:
            watch.report_progress(-1, f"measuring {name}")
            try:
                # Paths of this machine are not part of results that may be passed on.
                records[name], is_known = job.run_case(by_name[name])
                reused += is_known
            except (UserError, RunFailed) as error:
                text = str(error).replace(str(by_name[name].mask), by_name[name].mask.name)
                failed[name] = text, isinstance(error, UserError)
                report_case_failure(error, world, job.pictures.parent, name)
            line.advance(note=name)
    return records, failed, reused


def _write_results(
    args: argparse.Namespace,
    job: Measurement,
    cases: list[dict[str, Any]],
    failures: dict[str, str],
    scheme: LabelScheme,
) -> None:
    details = {
        "labels": ", ".join(f"{s.name} ({s.kind})" for s in scheme.structures),
        "one lesion": f"a connected component, connectivity {args.connectivity}",
    }
    if args.run is not None:
        details["masks"] = f"segmented by the run {args.run.resolve().name}"
    # The JSON goes first and comes last: where it exists, the other files belong to it.
    (args.out / "quantities.json").unlink(missing_ok=True)
    write_text(args.out / "lesions.csv", lesions_csv(cases))
    write_text(args.out / "structures.csv", structures_csv(cases, failures))
    pictures = {case["case"]: job.read_pictures(case["case"]) for case in cases}
    title = f"Quantities, {args.out.resolve().name}"
    write_text(
        args.out / "quantities.html", render_quantities(title, cases, failures, pictures, details)
    )
    content = {
        "schema": SCHEMA,
        "coordinates": "RAS+, mm",
        "labels": scheme.to_json(),
        "details": details,
        "cases": cases,
        "failed": failures,
    }
    write_json(args.out / "quantities.json", content)


def _result(
    args: argparse.Namespace,
    cases: list[dict[str, Any]],
    failures: Failures,
    reused: int,
    world: World,
) -> dict[str, Any]:
    lines: list[str] = []
    notes: list[str] = []
    for case in cases[:MAX_CASES_SHOWN]:
        volumes = ", ".join(
            # A cut structure is at least this large, hence the sign.
            f"{s['structure']} {'>= ' if s['cut_by'] else ''}{s['volume_ml']:.1f} ml"
            for s in case["structures"][:6]
        )
        count = len(case["lesions"])
        lines.append(f"{case['case']}: {volumes}; {count} lesion{'' if count == 1 else 's'}")
        notes += [f"{case['case']}: {note}" for note in case["notes"]]
    if len(cases) > MAX_CASES_SHOWN:
        lines.append(f"and {len(cases) - MAX_CASES_SHOWN} more cases")
    # All ranks have the same cases; the notes on stderr must appear once.
    world.call_on_rank0(partial(write_notes, *notes))
    write_lines(*lines, f"page: {args.out / 'quantities.html'}")
    all_mistakes = not cases and all(mistake for _, mistake in failures.values())
    return {
        "out": str(args.out),
        "page": str(args.out / "quantities.html"),
        "quantities": str(args.out / "quantities.json"),
        "n_cases": len(cases),
        "n_lesions": sum(len(case["lesions"]) for case in cases),
        "reused": reused,
        "failed": {name: text for name, (text, _) in failures.items()},
        "exit_code": EXIT_DONE if not failures else EXIT_USER if all_mistakes else EXIT_FAILED,
    }
