"""`liverseg train` from the store to the weights: samples per second and waits for data, by loader threads."""

import json
import statistics
from itertools import pairwise
from pathlib import Path

from .context import Context, Figures
from .data import CONFIGS, common_overrides, phantom_store, run_command, usable_workers

WORKERS = (1, 2, 4, 8)
STEPS, IGNORED_STEPS = 60, 20
"""The first steps choose kernels and fill caches."""


def run(context: Context) -> None:
    phantom_store(context)
    for workers in WORKERS:
        context.measure(
            "liverseg train, M",
            f"{workers} loader threads",
            lambda n=workers: train_once(context, n),
            needs_s=15,
        )
    context.measure(
        "liverseg train, M",
        "without augmentation, 8 loader threads",
        lambda: train_once(context, 8, "data.augmentation=none"),
        needs_s=15,
    )


def train_once(context: Context, workers: int, *overrides: str) -> Figures:
    usable_workers(context, workers)
    name = "_".join(["train", str(workers), *overrides]).replace("=", "_")
    run_dir = context.work / name
    steps = context.choose(STEPS, 3)
    run_command(
        "train", "--device", context.device.type, "--config", CONFIGS["M"],
        *common_overrides(context), f"run.dir={run_dir}", f"data.workers={workers}",
        f"train.max_steps={steps}", "train.log_every_steps=1", "validation.every_steps=0", *overrides,
    )  # fmt: skip
    return read_speed(run_dir, context.choose(IGNORED_STEPS, 1))


def read_speed(run_dir: Path, ignored: int) -> Figures:
    """Figures of the steps after the first ones, from the run's metrics.

    The logged speed is a mean over all steps, from which the time of a step follows.
    """
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(text) for text in lines]
    rows = [row for row in rows if "speed/samples_per_s" in row]
    config_samples = rows[0]["speed/samples_per_s"]
    ends_s = [row["step"] / row["speed/samples_per_s"] for row in rows]
    steps_s = [later - earlier for earlier, later in pairwise(ends_s)]
    batch = config_samples * rows[0]["speed/step_s_median"]
    measured = [batch * seconds for seconds in steps_s[ignored - 1 :]]
    waits = [row["speed/data_wait_s"] for row in rows[ignored:]]
    median_s = statistics.median(measured)
    return {
        "step_ms": median_s * 1e3,
        "samples_per_s": batch / (sum(measured) / len(measured)),
        "data_wait_ms": statistics.mean(waits) * 1e3,
        "data_wait_share": sum(waits) / sum(measured),
        "epochs_of_250_per_hour": 3600 / (250 * sum(measured) / len(measured)),
    }
