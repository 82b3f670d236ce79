"""Write report.html, summary.json and the tables again, from the ledger and pictures of a finished evaluation.

liverseg report runs/fold0
"""

import argparse
from typing import Any

from liverseg_dist.console import write_lines
from liverseg_dist.evaluation.results import load_results, rewrite_results
from liverseg_dist.texts.paths import path_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        type=path_argument,
        metavar="RUN_OR_DIR",
        help="evaluated run, or a folder that evaluate or score wrote",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    results = load_results(args.run)
    summary = rewrite_results(results)
    report = results.folder / "report.html"
    write_lines(f"{summary['n_cases']} cases", f"report: {report}")
    return {
        "report": str(report),
        "summary": str(results.folder / "summary.json"),
        "n_cases": summary["n_cases"],
    }
