"""Accuracy after equal time, or after equally many samples: this project and nnU-Net v2 on the same cases.

  OMP_NUM_THREADS=1 python tools/bench/accuracy.py OUT --seeds 0 1 2              phantoms, 450 CPU s of training each
  python tools/bench/accuracy.py OUT --systems ours --samples 1000                equal number of samples, any time
  python tools/bench/accuracy.py OUT --systems ours loss.name=dice_focal --name focal           other settings
  python tools/bench/accuracy.py OUT --systems nnunet --nnunet-trainer nnUNetTrainerNoDA        another trainer of nnU-Net
  python tools/bench/accuracy.py OUT --data Task03_Liver --fold 0 --config configs/task03_M.yaml \\
      --device cuda --seconds 86400 --seeds 0                              one GPU; budget in seconds of wall time

`ours` is this project. nnU-Net runs with its own planner, preprocessing, trainer, augmentation and predictor
(pip install '.[bench]'). On a CPU its planner gets fewer features and a small memory target, so that it chooses a
small network and patch; on a GPU its defaults hold. Both systems use the same training cases, predict the same test
cases on their own grids, and are scored by `liverseg score`. nnU-Net's masks are scored a second time with the
post-processing of this project's config ("+ clean-up").

The number of steps that fit the budget is measured first by two short trainings, because both systems decrease the
learning rate over a fixed number of steps; start-up time counts. Seconds are CPU seconds of the process and its
children; with a GPU, wall time. Settings must be chosen on other cases than the test cases: `--phantom-seed` makes
another set. Run the same line again to continue; results.jsonl in OUT has the finished results.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from accuracy_systems import Bench, NnUnet, Ours, liverseg, run_logged

from liverseg_dist.streams import guard_output_streams

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ("liver_dice", "tumour_dice", "tumour_dice_global", "lesion_recall", "lesion_precision")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings of ours, for a variant"
    )
    parser.add_argument(
        "--data", type=Path, help="data set in the layout of Task03; default: hard phantoms"
    )
    parser.add_argument("--cases", type=int, default=32, help="phantoms (32)")
    parser.add_argument("--phantom-seed", type=int, default=11, help="of the phantoms (11)")
    parser.add_argument(
        "--test-share", type=float, default=0.25, help="share of the cases that is tested (0.25)"
    )
    parser.add_argument(
        "--fold",
        type=int,
        choices=range(5),
        help="test on this one of nnU-Net's five folds instead",
    )
    parser.add_argument(
        "--config", type=Path, default=ROOT / "configs" / "accuracy_cpu.yaml", help="of ours"
    )
    parser.add_argument(
        "--systems", nargs="+", default=["ours", "nnunet"], choices=["ours", "nnunet"]
    )
    parser.add_argument(
        "--name", default="ours", help="of this variant of ours, in folders and the table"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--seconds", type=float, default=450, help="of training, each system and seed (450)"
    )
    parser.add_argument(
        "--samples", type=int, help="train on this many samples instead, whatever they cost"
    )
    parser.add_argument(
        "--nnunet-trainer", default="nnUNetTrainer", help="one of nnU-Net's own (nnUNetTrainer)"
    )
    parser.add_argument(
        "--base-features", type=int, help="nnU-Net's at full resolution (CPU: 8, GPU: its own)"
    )
    parser.add_argument(
        "--memory-gb", type=float, help="nnU-Net's planner target (CPU: 0.05, GPU: its own)"
    )
    parser.add_argument(
        "--spacing-mm", type=float, nargs=3, help="nnU-Net's voxels (CPU: 5 5 5, GPU: its own)"
    )
    args = parser.parse_intermixed_args()
    if args.device == "cpu":
        args.base_features = args.base_features or 8
        args.memory_gb = args.memory_gb or 0.05
        args.spacing_mm = args.spacing_mm or (5.0, 5.0, 5.0)
    return args


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    source = args.data or args.out / "Task03_Phantom"
    if args.data is None:
        kind = ("--cases", args.cases, "--seed", args.phantom_seed, "--difficulty", "hard")
        run_logged(args.out, "phantom", liverseg("phantom", source, *kind))
    bench = Bench(
        args.out, source, args.config, tuple(args.overrides), args.test_share, args.fold, args.device,
        args.nnunet_trainer, args.base_features, args.memory_gb, args.spacing_mm,
    )  # fmt: skip
    unit = "CPU s" if args.device == "cpu" else "s"
    budget = f"{args.samples} samples" if args.samples else f"{args.seconds:g} {unit}"
    variant = args.nnunet_trainer.removeprefix("nnUNetTrainer").strip("_")
    nnunet = f"nnunet_{variant}" if variant else "nnunet"
    contests = [
        Ours(bench, args.name) if system == "ours" else NnUnet(bench, nnunet)
        for system in args.systems
    ]
    if not args.samples:
        for contest in contests:  # one after the other, so that both have the same load
            contest.prepare()
            contest.steps_for(args.seconds)
    for seed in args.seeds:
        for contest in contests:
            name = contest.name
            if (name, seed, budget) in {
                (row["system"], row["seed"], row["budget"]) for row in rows_of(bench.out)
            }:
                continue
            about, scored = contest.run(seed, args.seconds, args.samples)
            with (bench.out / "results.jsonl").open("a") as file:
                for cleaning, summary in scored.items():
                    row = (
                        {"system": name + cleaning, "seed": seed, "budget": budget}
                        | about
                        | figures(summary)
                    )
                    file.write(json.dumps(row) + "\n")
                    print(json.dumps(row), flush=True)
    print_table(rows_of(bench.out))


def figures(summary: dict[str, Any]) -> dict[str, float]:
    """What is compared, from `liverseg score`'s summary; without a lesion found, precision is 0."""
    found = summary["tumour"]["detection"]["iou_0"]
    values = (
        summary["liver"]["dice_per_case"],
        summary["tumour"]["dice_per_case"],
        summary["tumour"]["dice_global"],
        found["recall"],
        found["precision"],
    )
    return {name: round(value or 0.0, 4) for name, value in zip(FIGURES, values, strict=True)}


def rows_of(out: Path) -> list[dict[str, Any]]:
    file = out / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def print_table(rows: list[dict[str, Any]]) -> None:
    """Mean and standard deviation over seeds."""
    print(
        f"\n{'system':20} {'budget':14} seeds {'steps':>7} {'samples':>8} {'train s':>8}  "
        + "  ".join(f"{name:>19}" for name in FIGURES)
    )
    for system, budget in dict.fromkeys((row["system"], row["budget"]) for row in rows):
        alike = [row for row in rows if (row["system"], row["budget"]) == (system, budget)]
        shown = []
        for name in FIGURES:
            values = [row[name] for row in alike]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            shown.append(f"{statistics.mean(values):.3f}{spread}")
        seconds = statistics.mean(row["train_s"] for row in alike)
        print(
            f"{system:20} {budget:14} {len(alike):5} {alike[0]['steps']:7} {alike[0]['samples']:8} {seconds:8.0f}  "
            + "  ".join(f"{text:>19}" for text in shown)
        )


if __name__ == "__main__":
    guard_output_streams()
    main()
