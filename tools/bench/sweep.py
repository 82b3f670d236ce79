"""Pruning of sweeps: steps saved, best setting found, use of the slots, and equality after interruptions.

  OMP_NUM_THREADS=1 python tools/bench/sweep.py OUT              9 settings x 3 folds on phantoms, about 25 CPU minutes

Four sweeps over the same settings with `python -m launch.tune`: without pruning; ASHA; Hyperband; Hyperband with
each fold on two processes, its driver killed (SIGKILL), stopped (SIGTERM) and started again. The last two must
agree in every trial, rung and score: gradients are summed sample by sample, so the number of processes has no effect.
Run the same line again to continue. The last lines are JSON.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from liverseg_dist.commands.main import main as liverseg
from liverseg_dist.streams import guard_output_streams

ROOT = Path(__file__).resolve().parents[2]
STEPS, RUNGS, FACTOR = 60, [10, 25], 3.0
SHARED: dict[str, Any] = {
    "sweep": {
        "search": "random",
        "folds": [0, 1, 2],
        "rungs": RUNGS,
        "reduction_factor": FACTOR,
        "space": {
            "train.learning_rate": {"type": "loguniform", "low": 1e-5, "high": 1e-1},
            "data.oversample_foreground": {"type": "uniform", "low": 0.33, "high": 1.0},
            "loss.name": {"type": "choice", "values": ["dice_ce", "dice_focal"]},
        },
        "resources": {"cpus": 1, "parallel_folds": 1},
    },
    "data": {"patch_size": [16, 32, 32], "workers": 0, "augmentation": "none"},
    "model": {"features": [8, 16, 32]},
    "train": {
        "max_steps": STEPS,
        "optimizer": "adamw",
        "ema_decay": 0.9,
        "deterministic_reduction": True,
    },
    "checkpoint": {"keep_best": False},
    "validation": {"max_cases": 2, "pictures": 0},
    "inference": {"overlap": 0.25},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--trials", type=int, default=9)
    args = parser.parse_args()
    store = args.out / "store.zarr"
    liverseg(
        [
            "phantom",
            str(args.out / "Task03_Phantom"),
            "--cases",
            "14",
            "--seed",
            "5",
            "--size",
            "small",
        ]
    )
    splits = ("convert.splits.folds=3", "convert.cleaning.spacing_mm=[5,5,5]")
    if liverseg(["convert", str(args.out / "Task03_Phantom"), str(store), *splits]):
        sys.exit("the phantoms could not be converted")
    variants: dict[str, dict[str, Any]] = {
        "unpruned": {"rungs": []},
        "asha": {"scheduler": "asha"},
        "hyperband": {"scheduler": "hyperband"},
        "disturbed": {
            "scheduler": "hyperband",
            "resources": {"cpus": 2, "processes": 2, "parallel_folds": 1},
        },
    }
    found = {}
    for name, changes in variants.items():
        config = args.out / f"{name}.yaml"
        sweep = {**SHARED["sweep"], "trials": args.trials, **changes}
        config.write_text(yaml.safe_dump({**SHARED, "sweep": sweep}))
        line = [
            sys.executable,
            "-m",
            "launch.tune",
            "--config",
            str(config),
            "--no-dashboard",
            "--cpus",
            "2",
        ]
        line += [f"data.store={store}", f"run.dir={args.out / name}"]
        if name == "disturbed" and not (args.out / name / "sweep.json").exists():
            interrupt(line, args.out / name, after=3, by=signal.SIGKILL)
            interrupt(line, args.out / name, after=12, by=signal.SIGTERM)
        if subprocess.run(line, cwd=ROOT).returncode:
            sys.exit(f"the sweep {name} failed")
        found[name] = json.loads((args.out / name / "sweep.json").read_text())
    for row in rows(found):
        print(json.dumps({"bench": "sweep", **row}))


def interrupt(line: list[str], folder: Path, after: int, by: signal.Signals) -> None:
    """Run the sweep until its journal has this number of rungs, then send the signal."""
    process = subprocess.Popen(line, cwd=ROOT)
    journal = folder / "journal.jsonl"
    while process.poll() is None and not (
        journal.exists() and journal.read_text().count('"rung"') >= after
    ):
        time.sleep(0.2)
    process.send_signal(by)
    print(f"{by.name} after {after} rungs: exit code {process.wait()}", flush=True)


def rows(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    best = {name: sweep["best"]["score"] for name, sweep in found.items()}
    made = []
    for name in ("asha", "hyperband"):
        steps, alone = found[name]["steps_run"], found["unpruned"]["steps_run"]
        made.append(
            {
                "case": name, "vs": "no pruning", "steps": steps, "steps_without": alone, "ratio": alone / steps,
                "saved": 1 - steps / alone, "best_dice": best[name], "best_dice_without": best["unpruned"],
                "worse_by": 1 - best[name] / best["unpruned"],
            }
        )  # fmt: skip
    made += [
        {"case": name, "vs": "slots", **sweep["last_session"]} for name, sweep in found.items()
    ]
    equal = outcome(found["hyperband"]) == outcome(found["disturbed"])
    made.append(
        {
            "case": "disturbed, two processes a fold",
            "vs": "undisturbed, one process a fold",
            "equal": equal,
        }
    )
    return made


def outcome(sweep: dict[str, Any]) -> dict[str, Any]:
    """What was tried and decided, and every fold's Dice; not how long it took."""
    scores = ("score", "liver", "tumour")
    return {
        trial["id"]: {
            "params": trial["params"],
            "state": trial["state"],
            "rungs": [
                (
                    r["step"],
                    r["decision"],
                    [[fold.get(name) for name in scores] for fold in r["folds"].values()],
                )
                for r in trial["rungs"]
            ],
        }
        for trial in sweep["trials"]
    }


if __name__ == "__main__":
    guard_output_streams()
    main()
