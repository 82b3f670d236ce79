"""Compare two evaluations case by case: mean differences, intervals, and a paired Wilcoxon test.

  liverseg compare runs/fold0 runs/fold0_wide
  liverseg compare scores/method_a scores/method_b --out comparison/
  liverseg compare runs/a_fold0,runs/a_fold1,runs/a_fold2 runs/b_fold0,runs/b_fold1,runs/b_fold2

Each argument is an evaluated run, or a folder that `evaluate` or `score` wrote. Folds of a cross-validation,
joined by commas, are pooled. Only cases that are in both evaluations are compared.
"""

import argparse
from pathlib import Path
from typing import Any

from liverseg_dist.console import write_lines
from liverseg_dist.errors import UserError
from liverseg_dist.evaluation.compare import compare_evaluations
from liverseg_dist.evaluation.results import load_pooled
from liverseg_dist.files import write_json
from liverseg_dist.texts.paths import expand_path, path_argument
from liverseg_dist.tracking.terminal_table import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "first", metavar="RUN_A", help="run or results folder (or several, joined by commas)"
    )
    parser.add_argument(
        "second", metavar="RUN_B", help="run or results folder to compare with it (or several)"
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="DIR", help="also write DIR/comparison.json"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the table of differences, and write it as JSON with --out."""
    first, second = load_pooled(parse_folders(args.first)), load_pooled(parse_folders(args.second))
    result = {"a": args.first, "b": args.second, **compare_evaluations(first, second)}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "comparison.json", result)
    left_out = len(result["only_a"]) + len(result["only_b"])
    # Cases of one evaluation only would change the means without saying anything about the
    # methods.
    rest = f", {left_out} in only one" if left_out else ""
    write_lines(f"A {args.first}", f"B {args.second}", f"{result['n_cases']} cases in both{rest}")
    headings = (
        "structure",
        "metric",
        "n",
        "A",
        "B",
        "B - A",
        "95 % interval",
        "p",
        "p Holm",
        "B better/worse",
    )
    rows = []
    for row in result["metrics"]:
        low, high = row["ci95"] or (None, None)
        means = [_format_figure(row[name]) for name in ("mean_a", "mean_b", "difference")]
        interval = f"{_format_figure(low)} {_format_figure(high)}"
        tests = [_format_figure(row[name]) for name in ("p", "p_holm")]
        counts = f"{row['better']}/{row['worse']}"
        rows.append(
            (row["structure"], row["metric"], str(row["n"]), *means, interval, *tests, counts)
        )
    print_table(headings, rows, right=headings[2:])
    return result


def parse_folders(text: str) -> list[Path]:
    """Split folders joined by commas. A text that names an existing folder is not split."""
    try:
        folder = expand_path(text)
        # A folder may have a comma in its name, so the file system decides before the text is
        # split.
        if folder.exists():
            return [folder]
        return [expand_path(part) for part in text.split(",") if part]
    except ValueError as error:
        raise UserError(f"{text}: {error}") from None


def _format_figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
