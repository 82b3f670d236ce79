"""Follow a patient over two or more scans: which lesion is which, growth, response (RECIST 1.1).

  liverseg follow 2024.nii.gz 2025.nii.gz --dates 2024-03-01,2025-01-15 --out follow/
  liverseg follow mask_1.nii.gz mask_2.nii.gz --images scan_1.nii.gz scan_2.nii.gz --out follow/
  liverseg follow scan_1.nii.gz scan_2.nii.gz --run runs/first --out follow/     segments first
  liverseg follow --table patients.csv --out cohort/        many patients; also under torchrun

Masks (or scans, with --run) in the order of the dates, baseline first. The organ of each scan is
registered to the baseline: rigid, then deformable (picsl-greedy where installed, else SimpleITK's
demons); lesions are then matched as persistent, new, vanished, merged or split, each with a
confidence. Sizes are measured on the scans' own voxels. Writes follow.json, follow.csv and
follow.html. Scans whose organs do not overlap after rigid registration are refused: they are hardly
one patient's.
"""

import argparse
import contextlib
import datetime
import io
import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from liverseg_dist.clinical.components import CONNECTIVITIES, LITS_CONNECTIVITY
from liverseg_dist.clinical.follow_page import draw_series, follow_csv, render_follow
from liverseg_dist.clinical.follow_up import FollowUp, TimePoint, choose_organ, follow_patient
from liverseg_dist.clinical.quantify import quantify_case
from liverseg_dist.clinical.registration_backends import BACKENDS
from liverseg_dist.commands.dicom_options import add_dicom, dicom_options
from liverseg_dist.commands.follow_cohort import Prepare, follow_cohort, read_patients
from liverseg_dist.commands.follow_segmentation import name_scans, segment_patients
from liverseg_dist.commands.options import add_inference
from liverseg_dist.commands.predict import load_prediction
from liverseg_dist.commands.quantify import add_labels
from liverseg_dist.commands.run_distributed import run_distributed
from liverseg_dist.commands.segment_scans import segment_scans
from liverseg_dist.console import write_lines, write_progress
from liverseg_dist.data.io.dicom_sources import is_dicom_source
from liverseg_dist.data.io.nifti import read_nifti
from liverseg_dist.data.io.scan_reader import ScanSource
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.startup import start_rank
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import EXIT_DONE, UserError, printable
from liverseg_dist.files import write_json, write_text
from liverseg_dist.inference.malloc_settings import keep_freed_memory
from liverseg_dist.inference.quantify import check_values, find_scheme, pair_images, read_on_grid
from liverseg_dist.label_scheme import parse_label_options
from liverseg_dist.labels import LabelScheme
from liverseg_dist.texts.names import derive_scan_id
from liverseg_dist.texts.paths import expand_user_path, path_argument

_logger = logging.getLogger(__name__)
SCHEMA = 1
RESULTS = ("follow.json", "follow.html", "follow.csv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="MASK",
        help="masks of one patient (.nii, .nii.gz), baseline first; with --run: scans, then inference.KEY=VALUE",
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="folder for the results"
    )
    parser.add_argument(
        "--dates",
        metavar="D,D,...",
        help="dates of the scans as 2024-03-01, ascending; needed for growth rates",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        type=path_argument,
        metavar="SCAN",
        help="scans of the masks, one for each in order, or a folder that has them by name",
    )
    parser.add_argument(
        "--run",
        type=path_argument,
        metavar="RUN",
        help="segment the given scans with this run first",
    )
    add_labels(parser)
    parser.add_argument(
        "--organ",
        metavar="NAME",
        help="structure to register by (default: the one that holds the lesions)",
    )
    parser.add_argument(
        "--registration",
        choices=BACKENDS,
        default="auto",
        help="deformable step: greedy (extra register), demons, or rigid for none; auto takes greedy where installed",
    )
    parser.add_argument(
        "--connectivity",
        type=int,
        choices=CONNECTIVITIES,
        default=LITS_CONNECTIVITY,
        help="neighbours that make one lesion: 6 faces (the default), 18 and edges, 26 and corners",
    )
    parser.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="go on although the scans look like two patients'",
    )
    parser.add_argument(
        "--table",
        type=path_argument,
        metavar="CSV",
        help="many patients: columns patient,date,scan (a mask; with --run a scan) and image; "
        "ranks share them, and a page shows all",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="with --run: also segment scans that the audit refuses, and mark them",
    )
    # The functions that segment scans read this option, which following has no use for.
    parser.set_defaults(probabilities=False)
    add_dicom(parser)
    add_inference(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    world = start_rank(args.device)
    if args.table is not None:
        return _follow_table(args, world)
    if world.is_distributed:
        raise UserError(
            "follow works on one patient and runs as one process; start it without torchrun or srun"
        )
    torch.set_num_threads(1)
    keep_freed_memory()
    # A file may have `=` in its name, so what exists is a file.
    overrides = [text for text in args.inputs if "=" in text and not Path(text).exists()]
    paths = [expand_user_path(text) for text in args.inputs if text not in overrides]
    if len(paths) < 2:
        raise UserError("follow needs at least two scans of the patient, baseline first")
    for path in paths:
        if not (path.is_file() or (args.run is not None and is_dicom_source(path))):
            raise UserError(
                f"{printable(path)}: no such file; name each mask (or scan, with --run)"
            )
    # A mask that is given twice would be followed as a stable disease.
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("a file is given twice; each date has a scan of its own")
    if args.run is None:
        dates = parse_dates(args.dates, len(paths))
        if overrides:
            raise UserError(f"{overrides[0]}: settings of inference need --run")
        scheme = parse_label_options(args.labels) if args.labels else find_scheme(paths)
        return _follow(
            args, paths, pair_images(args.images, paths, scheme, dicom_options(args)), scheme, dates
        )
    if args.images is not None:
        raise UserError("--images: with --run the given scans are the images")
    # Masks of the run go to a folder of their own, which a second call finds and does not compute
    # again.
    settings = argparse.Namespace(**{**vars(args), "out": args.out / "masks"})
    names = name_scans(paths, [f"scan_{number}" for number in range(1, len(paths) + 1)])
    job, scans = load_prediction(settings, overrides, paths, world, names)
    scheme = parse_label_options(args.labels) if args.labels else job.labels
    dates = parse_dates(args.dates, len(scans))

    def work(watch: HeartbeatMonitor) -> dict[str, Any]:
        failed = segment_scans(job, scans, world, watch)
        if failed:
            raise UserError(
                f"{', '.join(sorted(failed))}: could not be segmented, so the patient cannot be followed"
            )
        masks = [job.get_mask_file(scan.scan_id) for scan in scans]
        return _follow(args, masks, [scan.first for scan in scans], scheme, dates)

    return run_distributed(world, args.timeout, args.out, work)


def _follow_table(args: argparse.Namespace, world: World) -> dict[str, Any]:
    """Every patient of a table."""
    overrides = [text for text in args.inputs if "=" in text]
    if len(overrides) < len(args.inputs) or args.dates or args.images:
        raise UserError("--table names scans, dates and images itself")
    torch.set_num_threads(1)
    patients = read_patients(args.table)
    prepare: Prepare | None = None
    if args.run is not None:
        patients, labels, prepare = segment_patients(args, patients, overrides, world)
    elif overrides:
        raise UserError(f"{overrides[0]}: settings of inference need --run")
    else:
        labels = find_scheme([mask for patient in patients for mask in patient.masks])
    scheme = parse_label_options(args.labels) if args.labels else labels

    def follow_scans(
        own: argparse.Namespace,
        files: list[Path],
        images: list[Path | None],
        dates: list[datetime.date],
    ) -> dict[str, Any]:
        # Many patients are followed by several ranks; the lines of one patient would mix with
        # those of others. Its results are in its own folder.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return _follow(own, files, images, scheme, dates)

    return follow_cohort(args, patients, scheme, world, follow_scans, prepare)


def parse_dates(text: str | None, count: int) -> list[datetime.date] | None:
    """The dates of the scans, or None where they are not known.

    Raises:
        UserError: Another number of dates than scans, one that is no date, or dates that do not
            ascend.
    """
    if text is None:
        return None
    dates = []
    for part in text.split(","):
        try:
            dates.append(datetime.date.fromisoformat(part.strip()))
        except ValueError:
            raise UserError(
                f"--dates: {printable(part.strip())!r} is no date such as 2024-03-01"
            ) from None
    if len(dates) != count:
        raise UserError(f"--dates: {len(dates)} dates for {count} scans")
    for before, after in itertools.pairwise(dates):
        if after == before:
            raise UserError(
                f"--dates: {after} stands for two scans; each scan has a date of its own"
            )
        if after < before:
            raise UserError(
                f"--dates: {after} comes before {before}; give the scans in the order of their dates"
            )
    return dates


def _follow(
    args: argparse.Namespace,
    masks: list[Path],
    images: Sequence[ScanSource | None],
    scheme: LabelScheme,
    dates: list[datetime.date] | None,
) -> dict[str, Any]:
    # The lesions of an organ move with it, so the scans are registered by the organ.
    organ = choose_organ(scheme, args.organ)
    points, notes = [], []
    for number, (mask, image) in enumerate(zip(masks, images, strict=True), start=1):
        write_progress(f"measuring scan {number} of {len(masks)}")
        point, found = _read_point(mask, image, scheme, args.connectivity)
        points.append(point)
        notes += [f"{point.name}: {note}" for note in found]
    names = [point.name for point in points]
    if len(set(names)) < len(names):  # one name in two folders
        points = [
            replace(point, name=f"{point.name} ({number})")
            for number, point in enumerate(points, start=1)
        ]
    # Growth needs intervals only; the dates themselves are written to the results but not used in
    # the computation.
    days = None if dates is None else [float((date - dates[0]).days) for date in dates]
    follow = follow_patient(
        points,
        scheme,
        organ,
        days,
        args.connectivity,
        args.registration,
        args.allow_mismatch,
        write_progress,
    )
    return _write(args, follow, points, scheme, dates, notes)


def _read_point(
    file: Path, image_file: ScanSource | None, scheme: LabelScheme, connectivity: int
) -> tuple[TimePoint, list[str]]:
    mask = read_nifti(file, kind="label")
    notes = check_values(mask, scheme, file)
    image, note = read_on_grid(image_file, mask)
    notes += note
    quantities = quantify_case(mask, scheme, image, connectivity=connectivity)
    # Sizes come from the scan's own grid; only the pictures and the registration use the standard
    # axes.
    turned = None if image is None else image.reoriented()
    return TimePoint(derive_scan_id(file.name), mask.reoriented(), turned, quantities), notes


def _write(
    args: argparse.Namespace,
    follow: FollowUp,
    points: list[TimePoint],
    scheme: LabelScheme,
    dates: list[datetime.date] | None,
    notes: list[str],
) -> dict[str, Any]:
    content = {
        "schema": SCHEMA,
        "dates": None if dates is None else [date.isoformat() for date in dates],
        "labels": scheme.to_json(),
        **follow.content,
        "warnings": [*follow.content["warnings"], *notes],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    # The JSON goes first and comes last: where it exists, the other files belong to it.
    for name in RESULTS:
        (args.out / name).unlink(missing_ok=True)
    write_text(args.out / "follow.csv", follow_csv(content))
    title = f"Follow-up, {args.out.resolve().name}"
    write_text(
        args.out / "follow.html", render_follow(title, content, draw_series(follow, points, scheme))
    )
    write_json(args.out / "follow.json", content)
    for warning in content["warnings"]:
        _logger.warning("%s", warning)
    _print_summary(content, args.out)
    response = content["response"]
    return {
        "out": str(args.out),
        "page": str(args.out / "follow.html"),
        "follow": str(args.out / "follow.json"),
        "recist": response["recist"],
        "rule": response["rule"],
        "volumetric": response["volumetric"],
        "lesions": len(content["lesions"]),
        "warnings": content["warnings"],
        "exit_code": EXIT_DONE,
    }


def _print_summary(content: dict[str, Any], out: Path) -> None:
    lines = []
    for lesion in content["lesions"]:
        sizes = ["-" if mm is None else f"{mm:.1f}" for mm in lesion["long_axis_mm"]]
        axes = " -> ".join(sizes)
        lines.append(f"lesion {lesion['id']}: {lesion['status']}, long axis {axes} mm")
    response = content["response"]
    write_lines(
        *lines,
        f"RECIST 1.1: {response['recist']} ({response['rule']})",
        f"by volume: {response['volumetric']}",
        f"page: {out / 'follow.html'}",
    )
