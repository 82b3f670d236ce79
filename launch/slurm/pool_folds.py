"""Pool the validation scores of all folds into one exact summary: every training case scored once, by a model that
had not seen it.

  python -m launch.slurm.pool_folds runs/cv 5

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


def pool_fold_results(run: Path, folds: int) -> dict[str, Any]:
    """The pooled summary. Raises `UserError` when a fold is not evaluated, `RunFailed` when a case is in two folds."""
    results = [
        load_results(run / f"fold_{fold}" / EVALUATION / "validation") for fold in range(folds)
    ]
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
    for case in cases:
        ledger.write(case["case_id"], case)
    for result in results:
        _copy_pictures(result.folder / PICTURES, folder / PICTURES)
    return write_results(folder, cases, failed, _details(run, results), ledger)


def _details(run: Path, results: Sequence[Results]) -> dict[str, Any]:
    dice = [
        {name: result.summary[name]["dice_per_case"] for name in ("liver", "tumour")}
        for result in results
    ]
    return {
        "title": f"{run.resolve().name}, {len(results)} folds",
        "run": run.resolve().name,
        "part": f"validation cases of {len(results)} folds",
        "input": results[0].summary["details"].get("input", ""),
        "weights_sha256": [result.summary["details"].get("weights_sha256") for result in results],
        "dice_by_fold": dice,
    }


def _copy_pictures(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm.pool_folds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder with fold_0, fold_1, ...")
    parser.add_argument("folds", type=int, metavar="N", help="how many there are")
    args = parser.parse_args(argv)
    try:
        if args.folds < 1:
            raise UserError(f"{args.folds} folds: at least 1")
        summary = pool_fold_results(args.run, args.folds)
    except LiversegError as error:
        print(f"launch.slurm.pool_folds: {error}", file=sys.stderr)
        return error.exit_code
    for fold, dice in enumerate(summary["details"]["dice_by_fold"]):
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
