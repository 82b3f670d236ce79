"""Score a folder of predicted NIfTI masks against a folder of true masks.

  liverseg score predictions/ labelsTr/ --out scores/

Masks are matched by name; `_0000`, upper and lower case and .nii/.nii.gz do not matter. The labels are those
of --labels, else of the dataset.json in TRUTH_DIR or the folder above, else 0 background, 1 liver, 2 tumour.
A mask in another orientation is reoriented; a mask of another size is refused. Writes summary.json, cases.csv,
lesions.csv and report.html. Run the same line again after a stop: cases in the ledger are not scored again.
"""

import argparse
import logging
import time
from pathlib import Path
from typing import Any

from liverseg_dist.console import write_error, write_lines
from liverseg_dist.cores import usable_cores
from liverseg_dist.data.io.nifti import read_nifti
from liverseg_dist.data.io.source_labels import find_mask_labels
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER, UserError, printable
from liverseg_dist.evaluation.case_scores import structures_of_summary
from liverseg_dist.evaluation.metrics.lesions import CONNECTIVITIES, LITS_CONNECTIVITY
from liverseg_dist.evaluation.notes import list_distance_notes
from liverseg_dist.evaluation.pairing import Pairing, describe_left_out, find_images, pair_masks
from liverseg_dist.evaluation.report.terminal_summary import format_summary
from liverseg_dist.evaluation.results import LEDGER, PICTURES, write_results
from liverseg_dist.evaluation.score_folders import (
    PictureJob,
    ScoreJob,
    ScoreOutcome,
    draw_pairs,
    open_ledger,
    score_pairs,
    shorten_paths,
)
from liverseg_dist.evaluation.shown_cases import select_shown_cases
from liverseg_dist.label_scheme import parse_label_options
from liverseg_dist.labels import LabelScheme
from liverseg_dist.texts.paths import path_argument
from liverseg_dist.tracking.progress import show_progress
from liverseg_dist.volume import Volume

_logger = logging.getLogger(__name__)
# More names would push the result out of the terminal.
MAX_NAMED_CASES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prediction",
        type=path_argument,
        metavar="PRED_DIR",
        help="folder of predicted masks (or one file)",
    )
    parser.add_argument(
        "truth", type=path_argument, metavar="TRUTH_DIR", help="folder of true masks (or one file)"
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="folder for the results"
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="LABELS",
        help="a dataset.json, or NAME=VALUES for each structure: liver=1,2 tumour:lesion=2 "
        "(the kind is organ or lesion)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=usable_cores(),
        metavar="N",
        help="processes (default: usable CPUs, %(default)s)",
    )
    parser.add_argument(
        "--connectivity",
        type=int,
        choices=CONNECTIVITIES,
        default=LITS_CONNECTIVITY,
        help="voxels that belong to one lesion: neighbours by face (6, as LiTS, the default), "
        "by face or edge (18), or by face, edge or corner (26)",
    )
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="exit with 0 if cases have no prediction; they are still listed",
    )
    parser.add_argument(
        "--ignore-affine",
        action="store_true",
        help="compare the voxels as stored, without the orientation in the headers",
    )
    parser.add_argument(
        "--images",
        type=path_argument,
        metavar="DIR",
        help="CT scans (HU) to show behind the masks in the report",
    )
    parser.add_argument(
        "--no-pictures", action="store_true", help="write the report without pictures of cases"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Score all pairs of masks in parallel processes and write the results."""
    pairing = pair_masks(args.prediction, args.truth)
    for folder in (args.prediction, args.truth):
        for left_out in describe_left_out(folder):
            _logger.warning("%s", left_out)
    labels = _find_labels(args)
    ledger = open_ledger(args.out / LEDGER, args.connectivity, args.ignore_affine, labels)
    job = ScoreJob(ledger, read_mask, args.connectivity, args.ignore_affine, labels)
    outcomes = []
    with show_progress("score", len(pairing.pairs)) as line:
        for outcome in score_pairs(pairing.pairs, job, args.workers):
            outcomes.append(outcome)
            line.advance(note=outcome.case_id)
    # A pair that fails does not end the others; its reason is part of the results.
    failures = {outcome.case_id: outcome.error for outcome in outcomes if outcome.error is not None}
    for error in failures.values():
        write_error(error)
    scored = {outcome.case_id for outcome in outcomes if outcome.error is None}
    # The ledger may contain pairs of an earlier call that are not among today's folders.
    cases = [case for case in ledger.read_all() if case["case_id"] in scored]
    if not cases:
        first = next(iter(failures.values()), "no reason was recorded")
        raise UserError(
            f"{args.prediction}: none of {len(outcomes)} cases could be scored; the first: {first}"
        )
    if not args.no_pictures:
        _draw_pictures(args, pairing, job, cases)
    not_scored = {}
    for pair in pairing.pairs:
        if pair.case_id in failures:
            # Results may be passed on, so they do not contain the paths of this machine.
            not_scored[pair.case_id] = shorten_paths(failures[pair.case_id], pair)
    not_scored |= dict.fromkeys(pairing.missing, "no prediction")
    environment = {"date": time.strftime("%Y-%m-%d")}
    summary = write_results(args.out, cases, not_scored, _details(args), ledger, environment)
    _print_summary(summary, cases, pairing, args.out)
    dice = {}
    for structure in structures_of_summary(summary):
        scores = summary[structure]
        dice[structure] = {key: scores[key] for key in ("dice_per_case", "dice_global")}
    return {
        "out": str(args.out),
        "summary": str(args.out / "summary.json"),
        "report": str(args.out / "report.html"),
        "n_cases": summary["n_cases"],
        **dice,
        "reused": sum(outcome.is_reused for outcome in outcomes),
        "failed": failures,
        "missing": list(pairing.missing),
        "extra": list(pairing.extra),
        "exit_code": _exit_code(outcomes, pairing, args.allow_missing),
    }


def _find_labels(args: argparse.Namespace) -> LabelScheme:
    """The scheme of the masks: of the options, else of the data set that the truth belongs to.

    Raises:
        UserError: The options or the dataset.json are no scheme.
    """
    if args.labels:
        return parse_label_options(args.labels)
    # The truth states what its values mean; predictions often come without a dataset.json.
    folder = args.truth if args.truth.is_dir() else args.truth.parent
    return find_mask_labels(folder)


def _draw_pictures(
    args: argparse.Namespace, pairing: Pairing, job: ScoreJob, cases: list[dict[str, Any]]
) -> None:
    """Draw the cases that the report shows."""
    # The report shows the worst and the best cases, so only these are drawn.
    chosen = {case["case_id"] for _, case in select_shown_cases(cases)}
    pairs = [pair for pair in pairing.pairs if pair.case_id in chosen]
    drawing = PictureJob(args.out / PICTURES, find_images(args.images, pairs), read_nifti)
    with show_progress("pictures", len(pairs)) as line:
        for outcome in draw_pairs(pairs, job, drawing, args.workers):
            line.advance(note=outcome.case_id)
            if outcome.error is not None:
                write_error(outcome.error)


def read_mask(file: Path) -> Volume:
    """Read a mask file; a function of this module because worker processes import it by name."""
    return read_nifti(file, kind="label")


def _exit_code(outcomes: list[ScoreOutcome], pairing: Pairing, allow_missing: bool) -> int:
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        # A wrong file is a mistake of the call; anything else is a failure of the work.
        return EXIT_USER if all(outcome.is_user_error for outcome in failed) else EXIT_FAILED
    return EXIT_FAILED if pairing.missing and not allow_missing else EXIT_DONE


def _details(args: argparse.Namespace) -> dict[str, object]:
    # Only the names of the folders: their paths are not part of the result.
    prediction = printable(args.prediction.resolve().name)
    truth = printable(args.truth.resolve().name)
    return {
        "title": f"{prediction}: scores against {truth}",
        "prediction": prediction,
        "truth": truth,
        "lesion_connectivity": args.connectivity,
        "ignore_affine": args.ignore_affine,
    }


def _print_summary(
    summary: dict[str, Any], cases: list[dict[str, Any]], pairing: Pairing, out: Path
) -> None:
    lines = [f"{summary['n_cases']} cases", *format_summary(summary)]
    lines += [f"note: {note}" for note in list_distance_notes(cases)]
    for reason, names in (("prediction", pairing.missing), ("truth", pairing.extra)):
        if names:
            lines.append(f"no {reason} for {len(names)}: {', '.join(names[:MAX_NAMED_CASES])}")
    write_lines(*lines, f"report: {out / 'report.html'}")
