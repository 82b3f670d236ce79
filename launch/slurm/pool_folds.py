"""Pool the validation scores of all folds into one exact summary: every training case scored once, by a model that
had not seen it.

  python -m launch.slurm.pool_folds runs/cv 5
  python -m launch.slurm.pool_folds runs/cv 5 --only 1,3      of these alone: the report names them

Reads RUN/fold_K/evaluation/validation, writes RUN/evaluation (summary.json, cases.csv, report.html, ledger). It is the
last job of `launch train --array folds`.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liverseg_dist.errors import EXIT_DONE, LiversegError, RunFailed, UserError
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
from liverseg_dist.streams import guard_output_streams
from liverseg_dist.texts.paths import path_argument

from .. import PACKAGE, name_programs
from .arrays import format_indices, parse_indices


def pool_fold_results(run: Path, folds: int, only: Sequence[int] = ()) -> dict[str, Any]:
    """Pool the folds' results and write the summary and report.

    Args:
        run: the folder with fold_0, fold_1, ...
        folds: how many the store has.
        only: the folds to pool; empty: all.

    Raises:
        UserError: a fold is not evaluated.
        RunFailed: a case is in two folds.
    """
    chosen = list(only) or list(range(folds))
    results = [load_results(run / f"fold_{fold}" / EVALUATION / "validation") for fold in chosen]
    cases = [case for result in results for case in result.cases]
    ids = [case["case_id"] for case in cases]
    if twice := sorted({case_id for case_id in ids if ids.count(case_id) > 1}):
        raise RunFailed(
            f"{run}: {', '.join(twice[:3])} is in two folds; were they trained on one store?"
        )
    failed = {
        name: text for result in results for name, text in result.summary.get("failed", {}).items()
    }
    folder = run / EVALUATION
    ledger = Ledger(
        folder / LEDGER, {"folds": [str(r.summary["ledger"]["fingerprint"]) for r in results]}
    )
    move_earlier_results(folder, ledger.fingerprint)
    for case in cases:
        ledger.write(case["case_id"], case)
    for result in results:
        _copy_pictures(result.folder / PICTURES, folder / PICTURES)
    return write_results(
        folder,
        cases,
        failed,
        _details(run, results, folds, only),
        ledger,
        postprocessing=_common_postprocessing(results),
    )


def _common_postprocessing(results: Sequence[Results]) -> dict[str, Any] | None:
    """That of all folds, or by fold where they differ."""
    settings = [result.summary.get("postprocessing") for result in results]
    if all(one == settings[0] for one in settings):
        return settings[0]
    return {f"fold_{fold}": one for fold, one in enumerate(settings)}


def _details(
    run: Path, results: Sequence[Results], folds: int, only: Sequence[int]
) -> dict[str, Any]:
    which = f"{folds} folds" if not only else f"fold {format_indices(sorted(only))} of {folds}"
    dice = [
        {name: result.summary[name]["dice_per_case"] for name in ("liver", "tumour")}
        for result in results
    ]
    return {
        "title": f"{run.resolve().name}, {which}",
        "run": run.resolve().name,
        "part": f"validation cases of {which}",
        "input": results[0].summary["details"].get("input", ""),
        "weights_sha256": [result.summary["details"].get("weights_sha256") for result in results],
        "dice_by_fold": dice,
        "folds": list(only) or list(range(folds)),
    }


def _copy_pictures(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {PACKAGE}.slurm.pool_folds",
        description=name_programs(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", type=path_argument, metavar="RUN", help="the folder with fold_0, fold_1, ..."
    )
    parser.add_argument("folds", type=int, metavar="N", help="how many there are")
    parser.add_argument(
        "--only", default="", metavar="K,K", help="pool these folds alone (default: all)"
    )
    args = parser.parse_args(argv)
    try:
        if args.folds < 1:
            raise UserError(f"{args.folds} folds: at least 1")
        only = parse_indices(args.only, "--only") if args.only else []
        if only and only[-1] >= args.folds:
            raise UserError(f"--only {args.only}: no fold {only[-1]} of {args.folds}")
        summary = pool_fold_results(args.run, args.folds, only)
    except LiversegError as error:
        print(f"launch.slurm.pool_folds: {error}", file=sys.stderr)
        return error.exit_code
    details = summary["details"]
    for fold, dice in zip(details["folds"], details["dice_by_fold"], strict=True):
        print(
            f"fold {fold}: "
            + ", ".join(f"{name} Dice {_shown(value)}" for name, value in dice.items())
        )
    both = ", ".join(
        f"{name} Dice {_shown(summary[name]['dice_per_case'])}" for name in ("liver", "tumour")
    )
    print(
        f"all {summary['n_cases']} cases: {both}; report: {args.run / EVALUATION / 'report.html'}"
    )
    return EXIT_DONE


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    guard_output_streams()
    sys.exit(main())
