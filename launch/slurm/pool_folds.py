"""Pool the validation scores of all folds into one summary.

  python -m launch.slurm.pool_folds runs/cv 5
  python -m launch.slurm.pool_folds runs/cv 5 --only 1,3    only these folds, named in the report

Every training case is scored once, by the model that was not trained on it, so the pooled figures
are exact. Reads RUN/fold_K/evaluation/validation, writes RUN/evaluation (summary.json, cases.csv,
report.html, ledger). It is the last job of `launch train --array folds`.
"""

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from liverseg_dist.console import write_error, write_lines
from liverseg_dist.errors import EXIT_DONE, LiversegError, RunFailed, UserError
from liverseg_dist.evaluation.case_scores import structures_of_summary
from liverseg_dist.evaluation.earlier import move_earlier_results
from liverseg_dist.evaluation.ledger import Ledger
from liverseg_dist.evaluation.results import (
    EVALUATION,
    LEDGER,
    PICTURES,
    Results,
    load_results,
    write_results,
)
from liverseg_dist.logging_setup import set_up_logging
from liverseg_dist.streams import guard_output_streams
from liverseg_dist.texts.paths import path_argument
from liverseg_dist.texts.suggestions import SuggestingParser

from .. import PACKAGE, name_programs
from .arrays import format_indices, parse_indices


def pool_fold_results(run: Path, folds: int, only: Sequence[int] = ()) -> dict[str, Any]:
    """Pool the results of the folds and write summary and report.

    Args:
        run: The folder with fold_0, fold_1, ...
        folds: How many folds the store has.
        only: The folds to pool; empty: all.

    Returns:
        The content of summary.json.

    Raises:
        UserError: A fold is not evaluated.
        RunFailed: A case is in two folds.
    """
    chosen = list(only) or list(range(folds))
    results = [load_results(run / f"fold_{fold}" / EVALUATION / "validation") for fold in chosen]
    cases: list[Any] = []
    failed: dict[str, Any] = {}
    fingerprints = []
    for result in results:
        cases += result.cases
        failed |= result.summary.get("failed", {})
        fingerprints.append(str(result.summary["ledger"]["fingerprint"]))
    _check_distinct_cases(run, [case["case_id"] for case in cases])
    folder = run / EVALUATION
    # The fingerprint changes with each fold, so scores of other models are not reused.
    ledger = Ledger(folder / LEDGER, {"folds": fingerprints})
    # Results of earlier models are kept, but apart from these.
    move_earlier_results(folder, ledger.fingerprint)
    for case in cases:
        ledger.write(case["case_id"], case)
    for result in results:
        _copy_pictures(result.folder / PICTURES, folder / PICTURES)
    return write_results(
        folder,
        cases,
        failed,
        _build_details(run, results, folds, only),
        ledger,
        postprocessing=_merge_postprocessing(results),
    )


def _check_distinct_cases(run: Path, case_ids: Sequence[str]) -> None:
    """Raise `RunFailed` if a case is in two folds."""
    counts = Counter(case_ids)
    duplicates = sorted(case_id for case_id, count in counts.items() if count > 1)
    if duplicates:
        raise RunFailed(
            f"{run}: {', '.join(duplicates[:3])} is in two folds; train all folds on one store"
        )


def _merge_postprocessing(results: Sequence[Results]) -> dict[str, Any] | None:
    """The postprocessing of all folds, or by fold if they differ."""
    settings = [result.summary.get("postprocessing") for result in results]
    if all(other == settings[0] for other in settings):
        return settings[0]
    return {f"fold_{fold}": setting for fold, setting in enumerate(settings)}


def _build_details(
    run: Path, results: Sequence[Results], folds: int, only: Sequence[int]
) -> dict[str, Any]:
    """The section `details` of the summary."""
    which = f"{folds} folds" if not only else f"fold {format_indices(sorted(only))} of {folds}"
    dice_by_fold = []
    for result in results:
        dice_by_fold.append(_collect_dice(result.summary))
    weights = [result.summary["details"].get("weights_sha256") for result in results]
    return {
        "title": f"{run.resolve().name}, {which}",
        "run": run.resolve().name,
        "part": f"validation cases of {which}",
        "input": results[0].summary["details"].get("input", ""),
        "weights_sha256": weights,
        "dice_by_fold": dice_by_fold,
        "folds": list(only) or list(range(folds)),
    }


def _copy_pictures(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)


def build_parser() -> argparse.ArgumentParser:
    parser = SuggestingParser(
        prog=f"python -m {PACKAGE}.slurm.pool_folds",
        description=name_programs(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", type=path_argument, metavar="RUN", help="the folder with fold_0, fold_1, ..."
    )
    parser.add_argument("folds", type=int, metavar="N", help="the number of folds")
    parser.add_argument(
        "--only", default="", metavar="K,K", help="pool only these folds (default: all)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Pool the folds and print the scores; returns the exit code."""
    args = build_parser().parse_args(argv)
    set_up_logging()
    try:
        if args.folds < 1:
            raise UserError(f"{args.folds} folds: at least 1")
        only = parse_indices(args.only, "--only") if args.only else []
        if only and only[-1] >= args.folds:
            raise UserError(f"--only {args.only}: no fold {only[-1]} of {args.folds}")
        summary = pool_fold_results(args.run, args.folds, only)
    except LiversegError as error:
        write_error(error, "launch.slurm.pool_folds")
        return error.exit_code
    details = summary["details"]
    lines = []
    for fold, dice in zip(details["folds"], details["dice_by_fold"], strict=True):
        lines.append(f"fold {fold}: {_format_scores(dice)}")
    total = _collect_dice(summary)
    report = args.run / EVALUATION / "report.html"
    lines.append(f"all {summary['n_cases']} cases: {_format_scores(total)}; report: {report}")
    write_lines(*lines)
    return EXIT_DONE


def _collect_dice(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """Mean Dice by structure."""
    return {name: summary[name]["dice_per_case"] for name in structures_of_summary(summary)}


def _format_scores(dice: Mapping[str, float | None]) -> str:
    """`liver Dice 0.9500, tumour Dice undefined`."""
    parts = []
    for name, value in dice.items():
        parts.append(f"{name} Dice {'undefined' if value is None else f'{value:.4f}'}")
    return ", ".join(parts)


if __name__ == "__main__":
    guard_output_streams()
    sys.exit(main())
