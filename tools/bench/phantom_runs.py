"""Phantoms, stores and small trainings for `partial_labels.py` and `missing_channel.py`."""

import argparse
import csv
import json
import shutil
import statistics
from collections.abc import Iterable
from pathlib import Path

from accuracy_systems import liverseg, run_logged

SETTINGS = (
    "data.fold=all",
    "data.patch_size=[24,40,48]",
    "data.augmentation=none",
    "data.oversample_foreground=0.67",
    "data.workers=0",
    "loss.class_weights=auto",
    "model.preset=tiny",
    "train.threads=1",
    "train.global_batch_size=2",
    "train.micro_batch_size=2",
    "train.optimizer=adamw",
    "train.learning_rate=3e-3",
    "train.weight_decay=1e-2",
    "train.schedule.name=cosine",
    "train.schedule.warmup_steps=20",
    "train.ema_decay=0.99",
    "validation.every_steps=0",
    "inference.overlap=0.5",
    "inference.largest_component=true",
)
"""One CPU core: patches of 144 x 240 x 288 mm, which show on which side of the body they are."""
CONVERT = ("convert.cleaning.spacing_mm=[6,6,6]", "convert.splits.test_fraction=0")


def add_arguments(parser: argparse.ArgumentParser, steps: int) -> None:
    parser.add_argument("out", type=Path, help="folder; run the same line again to continue")
    parser.add_argument("--cases", type=int, default=6, help="scans of a training set (6)")
    parser.add_argument("--test-cases", type=int, default=8, help="scans to test on (8)")
    parser.add_argument("--steps", type=int, default=steps, help=f"of each training ({steps})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of training")


def make_phantom(out: Path, name: str, cases: int, seed: int, *options: str) -> Path:
    """Make (or complete) a set of phantoms with liver, tumours, spleen and kidneys."""
    folder = out / name
    words = ("--cases", cases, "--seed", seed, "--organs", "liver,spleen,kidneys")
    run_logged(out, f"{name}_phantom", liverseg("phantom", folder, *words, *options))
    return folder


def convert(out: Path, name: str, *sources: Path) -> Path:
    """Convert data sets to one store of training cases."""
    store = out / f"{name}.zarr"
    run_logged(out, f"{name}_convert", liverseg("convert", *sources, store, *CONVERT))
    return store


def train(
    out: Path, name: str, store: Path, seed: int, steps: int, overrides: Iterable[str]
) -> Path:
    """Train a network and keep its CPU seconds; a finished run is kept."""
    run = out / "runs" / f"{name}_seed{seed}_{steps}"
    record = run.with_suffix(".json")
    if not record.is_file():
        if run.exists():
            # Of a bench that was interrupted: its CPU seconds are unknown.
            shutil.rmtree(run)
        own = (f"data.store={store}", f"run.dir={run}", f"seed={seed}", f"train.max_steps={steps}")
        command = liverseg("train", "--device", "cpu", *SETTINGS, *overrides, *own)
        cpu_s, _, _ = run_logged(out, f"{run.name}_train", command)
        record.write_text(json.dumps({"cpu_s": round(cpu_s)}))
    return run


def read_cpu_s(run: Path) -> int:
    """CPU seconds of the training of a run."""
    return json.loads(run.with_suffix(".json").read_text())["cpu_s"]


def score(out: Path, name: str, run: Path, scans: Iterable[str], truth: Path) -> dict[str, float]:
    """Predict scans and return the Dice of each structure that the run can segment.

    Args:
        out: Folder of the bench.
        name: Of the prediction.
        run: A trained run.
        scans: Arguments of `liverseg predict` that name the scans.
        truth: Folder of the true masks.

    Returns:
        Structure -> mean Dice over the cases that have it.
    """
    masks = out / "masks" / f"{run.name}_{name}"
    scores = out / "scores" / masks.name
    options = ("--device", "cpu", "--out", masks, "--quiet")
    run_logged(out, f"{masks.name}_predict", liverseg("predict", run, *scans, *options))
    command = liverseg("score", masks, truth, "--out", scores, "--no-pictures", "--workers", 1)
    run_logged(out, f"{masks.name}_score", command)
    dice: dict[str, list[float]] = {}
    with (scores / "cases.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            # A truth without the structure has Dice 0 or 1, which measures something else.
            if int(row["truth_voxels"]):
                dice.setdefault(row["structure"], []).append(float(row["dice"]))
    return {structure: statistics.mean(values) for structure, values in dice.items()}
