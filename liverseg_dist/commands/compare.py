"""Compare two evaluations case by case: mean differences, intervals, and a paired Wilcoxon test.

  liverseg compare runs/fold0 runs/fold0_wide
  liverseg compare scores/ours scores/theirs --out comparison/

Each is a run that was evaluated, or a folder that `evaluate` or `score` wrote. Only cases that both have are compared.
"""

import argparse
from pathlib import Path

from liverseg_dist.evaluation.compare import compare
from liverseg_dist.evaluation.ledger import write_json
from liverseg_dist.evaluation.results import load_results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, metavar="RUN_A", help="run or results folder")
    parser.add_argument("second", type=Path, metavar="RUN_B", help="run or results folder to compare with it")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write DIR/comparison.json")


def run(args: argparse.Namespace) -> dict:
    first, second = load_results(args.first), load_results(args.second)
    result = {"a": str(args.first), "b": str(args.second), **compare(first.cases, second.cases)}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "comparison.json", result)
    print(f"A {args.first}\nB {args.second}\n{result['n_cases']} cases in both", end="")
    left_out = len(result["only_a"]) + len(result["only_b"])
    print(f", {left_out} in one only" if left_out else "")
    print(
        f"\n{'':17}{'n':>5}{'A':>10}{'B':>10}{'B - A':>10}   {'95 % interval':19}{'p':>8}{'p Holm':>8}   B better/worse"
    )
    for row in result["metrics"]:
        low, high = row["ci95"] or (None, None)
        print(
            f"{row['structure']:7}{row['metric']:10}{row['n']:5}{_shown(row['mean_a'])}{_shown(row['mean_b'])}"
            f"{_shown(row['difference'])}  {_shown(low, 9)} {_shown(high, 9)}{_shown(row['p'], 8)}"
            f"{_shown(row['p_holm'], 8)}   {row['better']}/{row['worse']}"
        )
    return result


def _shown(value: float | None, width: int = 10) -> str:
    return f"{'-' if value is None else f'{value:.4f}':>{width}}"
