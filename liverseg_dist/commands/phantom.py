"""Make a synthetic data set: abdominal CTs with liver, tumours and other organs in the layout of
Task03_Liver; on request MR, CT with MR, and labels of other organs.

  liverseg phantom /tmp/phantom --cases 20 --seed 7
  liverseg phantom /tmp/phantom --cases 6 --size full --montage look.png
  liverseg phantom /tmp/patients --cases 10 --follow-up 2     ten patients, each at a baseline and
  two later dates
  liverseg phantom /tmp/both --modality ct+mr --organs liver,spleen,kidneys     CT and MR of each
  patient, in nnU-Net's layout

Case k depends only on k and the options for seed, size, difficulty, modality and structures, not on
the number of cases or workers. Run the same line again, or with more cases, to continue: existing
cases are kept.
"""

import argparse
from dataclasses import asdict
from typing import Any

from liverseg_dist.commands.phantom_channels import (
    add_channel_arguments,
    is_task03,
    make_channel_set,
)
from liverseg_dist.console import write_lines
from liverseg_dist.errors import UserError
from liverseg_dist.phantom.dataset import (
    FIRST_TEST,
    CaseSummary,
    PhantomSet,
    check_folder,
    write_dataset,
)
from liverseg_dist.phantom.follow_up_dataset import (
    FollowUpSet,
    check_follow_up_folder,
    write_follow_ups,
)
from liverseg_dist.phantom.montage import draw_montage
from liverseg_dist.texts.paths import path_argument, quote_path
from liverseg_dist.tracking.progress import show_progress
from liverseg_dist.tracking.terminal_table import print_table

MONTAGE_CASES = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=path_argument,
        metavar="DST",
        help="new folder, or one that was made with the same seed",
    )
    parser.add_argument(
        "--cases", type=int, default=20, metavar="N", help="scans with labels (default 20)"
    )
    parser.add_argument(
        "--test-cases",
        type=int,
        default=0,
        metavar="M",
        help="scans without labels, in imagesTs (default 0)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of all random numbers (default 0)"
    )
    parser.add_argument(
        "--size", choices=("small", "full"), default="small",
        help="small: 96 to 128 pixels of about 3 mm, 24 to 90 slices, tumours of 16 to 60 mm, for demo and tests; "
        "full: 512 pixels of 0.6 to 0.9 mm, slices of 1 to 5 mm, tumours of 4 to 60 mm (default small)",
    )  # fmt: skip
    parser.add_argument(
        "--difficulty", choices=("easy", "hard"), default="easy",
        help="hard: more noise, a third of the tumours nearly isodense, cysts and focal fat (default easy)",
    )  # fmt: skip
    parser.add_argument(
        "--follow-up", type=int, default=0, metavar="N",
        help="each patient also at N later dates, with lesions that grow, shrink, merge, split, appear and vanish; "
        "truth/ and follow_up.json state which is which (default 0)",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, metavar="K", help="processes (default 1)")
    parser.add_argument(
        "--montage",
        type=path_argument,
        metavar="PNG",
        help=f"also draw the first {MONTAGE_CASES} cases with their labels",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be made, and exit")
    add_channel_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    if (
        not 1 <= args.cases <= FIRST_TEST
        or args.test_cases < 0
        or args.workers < 1
        or args.seed < 0
    ):
        raise UserError(
            f"--cases must be 1 to {FIRST_TEST}, --workers at least 1, --test-cases and --seed at least 0"
        )
    # Checked before the cases are made: the format of the picture follows from the name.
    if args.montage and args.montage.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"--montage {args.montage}: the name must end in .png or .jpg")
    wanted = PhantomSet(
        args.folder, args.cases, args.test_cases, args.seed, args.size, args.difficulty == "hard"
    )
    # The generator of Task03 is separate, because the bytes of its cases must not change with new
    # options.
    if not is_task03(args):
        if args.follow_up:
            raise UserError("--follow-up makes CTs of the liver only; leave out the other options")
        return make_channel_set(args, MONTAGE_CASES)
    if args.follow_up:
        return _make_follow_ups(args)
    if args.dry_run:
        check_folder(wanted)
        write_lines(
            f"would make {args.cases} labelled and {args.test_cases} unlabelled {args.size} scans "
            f"in {args.folder}"
        )
        return {"folder": str(args.folder), "dry_run": True}
    with show_progress("phantom", args.cases + args.test_cases) as line:
        cases = write_dataset(wanted, args.workers, lambda case: line.advance(note=case.case_id))
    _print_table(cases)
    if args.montage:
        shown = [case.case_id for case in cases if case.liver_ml is not None][:MONTAGE_CASES]
        args.montage.parent.mkdir(parents=True, exist_ok=True)
        draw_montage(args.folder, shown).save(args.montage)
        write_lines(f"picture: {args.montage}")
    write_lines(
        f"{len(cases)} scans in {args.folder}; next: liverseg convert {quote_path(args.folder)} STORE"
    )
    return {"folder": str(args.folder), "cases": [asdict(case) for case in cases]}


def _make_follow_ups(args: argparse.Namespace) -> dict[str, Any]:
    """Patients at several dates instead of single scans."""
    if args.follow_up < 0 or args.test_cases or args.workers > 1 or args.montage:
        raise UserError(
            "--follow-up must be at least 1 and excludes --test-cases, --workers and --montage"
        )
    wanted = FollowUpSet(
        args.folder, args.cases, args.follow_up + 1, args.seed, args.size, args.difficulty == "hard"
    )
    if args.dry_run:
        check_follow_up_folder(wanted)
        write_lines(f"would make {args.cases} patients at {wanted.dates} dates in {args.folder}")
        return {"folder": str(args.folder), "dry_run": True}
    with show_progress("phantom", args.cases) as line:
        patients = write_follow_ups(wanted, lambda name: line.advance(note=name))
    write_lines(
        f"{len(patients)} patients at {wanted.dates} dates in {args.folder}; "
        "next: liverseg follow labelsTr/..."
    )
    return {"folder": str(args.folder), "patients": patients}


def _print_table(cases: list[CaseSummary]) -> None:
    # Without a label the volumes are unknown, which is not the same as zero.
    headings = ("case", "voxels zyx", "spacing mm zyx", "axes", "liver ml", "tumours", "tumour ml")
    rows = []
    for case in cases:
        voxels = "x".join(map(str, case.shape_zyx))
        spacing = "x".join(f"{s:.2f}" for s in case.spacing_mm)
        found = ("-", "-", "-")
        if case.liver_ml is not None:
            found = (f"{case.liver_ml:.0f}", str(case.tumours), f"{case.tumour_ml:.1f}")
        rows.append((case.case_id, voxels, spacing, case.orientation, *found))
    print_table(headings, rows, right=[name for name in headings if name not in ("case", "axes")])
