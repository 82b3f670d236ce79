"""Dice on held-out phantoms after equally many samples, and the time that this took, of both systems.

It is `accuracy.py` with a small budget: nnU-Net has its own planner, preprocessing, trainer and
predictor. Start-up counts for nnU-Net, which runs in processes of its own; this project's commands
run in this process, whose imports are done.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from accuracy import figures
from accuracy_systems import Bench, NnUnet, Ours

from .context import ROOT, Context, Figures
from .data import phantom_source, run_command

SAMPLES = 3000
PACKAGES = ("nnunetv2", "batchgenerators", "batchgeneratorsv2", "blosc2", "SimpleITK")
LIVERSEG = ["-m", "liverseg_dist"]


@dataclass(frozen=True)
class BenchInProcess(Bench):
    """A bench that runs the commands of this project in this process, which saves their start."""

    def timed(
        self, name: str, command: list[str], environment: dict[str, str] | None = None
    ) -> tuple[float, str]:
        if command[1:3] != LIVERSEG:
            return super().timed(name, command, environment)
        cpu_s, clock_s = time.process_time(), time.perf_counter()
        run_command(*command[3:])
        spent = time.process_time() - cpu_s, time.perf_counter() - clock_s
        return spent[0 if self.device == "cpu" else 1], ""


def run(context: Context) -> None:
    context.measure("phantoms", "liverseg", lambda: train_and_score(context, "ours"), needs_s=25)
    context.measure(
        "phantoms",
        "nnU-Net",
        lambda: train_and_score(context, "nnunet"),
        packages=PACKAGES,
        needs_s=30,
    )


def train_and_score(context: Context, system: str) -> Figures:
    out = context.work / "time_to_dice"
    if system == "ours":
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(exist_ok=True)
    bench = build_bench(context, out, phantom_source(context))
    contest = Ours(bench, "ours") if system == "ours" else NnUnet(bench, "nnunet")
    samples = context.choose(SAMPLES, 4)
    about, scored = contest.run(0, 0.0, samples)
    seconds = f"{'CPU ' if context.is_small else ''}seconds"
    kept = {key: about[key] for key in ("steps", "samples", "prepare_s", "train_s", "predict_s")}
    return {**kept, "unit": seconds, **figures(scored[""])}


def build_bench(context: Context, out: Path, source: Path) -> Bench:
    settings = () if not context.is_small else ("convert.cleaning.spacing_mm=[8,8,8]",)
    return BenchInProcess(
        out, source, ROOT / "configs" / "accuracy_cpu.yaml", settings, 0.25, None,
        context.device.type, "nnUNetTrainer", 8, 0.05, (5.0, 5.0, 5.0),
    )  # fmt: skip
