"""Make a synthetic data set in the layout of Task03_Liver: abdomen CTs with liver, tumours and what surrounds them.

  liverseg phantom /tmp/phantom --cases 20 --seed 7
  liverseg phantom /tmp/phantom --cases 6 --size full --montage look.png

Case k is a pure function of (seed, size, difficulty, k): the same bytes on any machine with the same library versions.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from liverseg_dist.data.phantom.dataset import CaseSummary, PhantomSet, write_dataset
from liverseg_dist.data.phantom.montage import montage
from liverseg_dist.errors import UserError
from liverseg_dist.tracking.progress import progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DST", help="new folder, or one made before with the same seed")
    parser.add_argument("--cases", type=int, default=20, help="scans with labels (default 20)")
    parser.add_argument("--test-cases", type=int, default=0, help="scans without labels, in imagesTs (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--size", choices=("small", "full"), default="small",
        help="small: about 100 x 100 px of 3.3 mm, tumours of 14 to 60 mm, for demo and tests; "
        "full: 0.6 to 0.9 mm pixels, 1 to 5 mm slices, tumours of 4 to 60 mm (default small)",
    )  # fmt: skip
    parser.add_argument(
        "--difficulty", choices=("easy", "hard"), default="easy", help="hard: more noise, a quarter nearly isodense"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--montage", type=Path, metavar="PNG", help="also make a picture of the first 12 cases")
    parser.add_argument("--dry-run", action="store_true", help="say what would be made, and stop")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.cases < 1 or args.test_cases < 0 or args.workers < 1 or args.seed < 0:
        raise UserError("--cases and --workers are at least 1, --test-cases and --seed at least 0")
    wanted = PhantomSet(args.folder, args.cases, args.test_cases, args.seed, args.size, args.difficulty == "hard")
    if args.dry_run:
        print(f"would make {args.cases} labelled and {args.test_cases} unlabelled {args.size} scans in {args.folder}")
        return {"folder": str(args.folder), "dry_run": True}
    with progress("phantom", args.cases + args.test_cases) as line:
        cases = write_dataset(wanted, args.workers, lambda case: line.advance(note=case.case_id))
    _print_table(cases)
    if args.montage:
        montage(args.folder, [case.case_id for case in cases[: min(12, args.cases)]]).save(args.montage)
        print(f"picture: {args.montage}")
    print(f"{len(cases)} scans in {args.folder}; next: liverseg convert {args.folder} STORE")
    return {"folder": str(args.folder), "cases": [asdict(case) for case in cases]}


def _print_table(cases: list[CaseSummary]) -> None:
    table = Table(box=None, header_style="bold")
    for heading in ("case", "voxels z y x", "spacing mm", "axes", "liver ml", "tumours", "tumour ml"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("case", "axes") else "right")
    for case in cases:
        voxels = " x ".join(map(str, case.shape_zyx))
        spacing = " x ".join(f"{s:.2f}" for s in case.spacing_mm)
        row = (case.case_id, voxels, spacing, case.orientation, f"{case.liver_ml:.0f}", str(case.tumours))
        table.add_row(*row, f"{case.tumour_ml:.1f}")
    Console().print(table)
