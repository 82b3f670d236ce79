"""What is learnt in equal CPU time, or from equally many samples: ours and nnU-Net v2 on the same cases.

  OMP_NUM_THREADS=1 python tools/bench/accuracy.py OUT                          phantoms, 900 CPU s of training each
  python tools/bench/accuracy.py OUT --cpu-seconds 7200 --seeds 0 1 2
  python tools/bench/accuracy.py OUT --data Task03_Liver --config configs/task03_S.yaml ...
  python tools/bench/accuracy.py OUT --systems ours loss.name=dice_focal --name focal      one variant of ours

nnU-Net runs with its own planner, preprocessing, trainer, augmentation and predictor (pip install '.[bench]'); base
features and memory target only make its planner choose a network that a CPU can train. Both see the same training
cases, predict the same test cases on their own grids and are scored by `liverseg score`. How many steps fit the budget
is measured first by two short trainings, because both lower the learning rate over a number of steps fixed beforehand.
CPU seconds are those of the process and all its children. Run the same line again to continue; results.jsonl in OUT
keeps what is done.
"""

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DATASET = "Dataset003_Liver"
FIGURES = ("liver_dice", "tumour_dice", "tumour_dice_global", "lesion_recall", "lesion_precision")


@dataclass(frozen=True)
class Bench:
    """One data set, one split, one folder."""

    out: Path
    source: Path
    config: Path
    overrides: tuple[str, ...]
    test_share: float
    base_features: int
    memory_gb: float

    @property
    def split(self) -> dict[str, Any]:
        """Every n-th case is tested; the rest trains. Written once, so that it stays."""
        file = self.out / "split.json"
        if not file.is_file():
            names = sorted(path.name.removesuffix(".nii.gz") for path in (self.source / "labelsTr").glob("*.nii.gz"))
            test = names[:: max(2, round(1 / self.test_share))]
            train = [name for name in names if name not in test]
            file.write_text(json.dumps({"test": test, "folds": [train[::2], train[1::2]]}))
        return json.loads(file.read_text())

    def image(self, case_id: str) -> Path:
        return self.source / "imagesTr" / f"{case_id}.nii.gz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of ours, for a variant")
    parser.add_argument("--data", type=Path, help="Task03 layout; default: hard phantoms, made here")
    parser.add_argument("--cases", type=int, default=32, help="phantoms (32)")
    parser.add_argument("--test-share", type=float, default=0.25, help="share of the cases that is tested (0.25)")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "accuracy_cpu.yaml", help="of ours")
    parser.add_argument("--systems", nargs="+", default=["ours", "nnunet"], choices=["ours", "nnunet"])
    parser.add_argument("--name", default="ours", help="of this variant of ours, in folders and the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cpu-seconds", type=float, default=900, help="of training, each system and seed (900)")
    parser.add_argument("--samples", type=int, help="train on this many samples instead, whatever they cost")
    parser.add_argument("--base-features", type=int, default=8, help="nnU-Net's at full resolution (8)")
    parser.add_argument("--memory-gb", type=float, default=0.6, help="nnU-Net's planner target (0.6)")
    args = parser.parse_intermixed_args()
    args.out.mkdir(parents=True, exist_ok=True)
    source = args.data or args.out / "Task03_Phantom"
    if args.data is None:
        run_logged(
            args.out,
            "phantom",
            liverseg("phantom", source, "--cases", args.cases, "--seed", 11, "--difficulty", "hard"),
        )
    bench = Bench(
        args.out, source, args.config, tuple(args.overrides), args.test_share, args.base_features, args.memory_gb
    )
    for seed in args.seeds:
        for system in args.systems:
            name = args.name if system == "ours" else system
            budget = f"{args.samples} samples" if args.samples else f"{args.cpu_seconds:g} CPU s"
            if (name, seed, budget) in {(row["system"], row["seed"], row["budget"]) for row in rows_of(bench.out)}:
                continue
            contest = Ours(bench, name) if system == "ours" else NnUnet(bench)
            row = {"system": name, "seed": seed, "budget": budget} | contest.run(seed, args.cpu_seconds, args.samples)
            with (bench.out / "results.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    print_table(rows_of(bench.out))


class System:
    """Prepares once, learns what a step costs, trains, predicts, is scored."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.bench, self.name = bench, name

    def prepare(self) -> dict[str, Any]:
        raise NotImplementedError

    def train(self, steps: int, seed: int, run: Path) -> tuple[float, dict[str, Any]]:
        """CPU seconds, and what else is known."""
        raise NotImplementedError

    def predict(self, run: Path, out: Path) -> float:
        raise NotImplementedError

    def run(self, seed: int, cpu_seconds: float, samples: int | None) -> dict[str, Any]:
        ready = self.prepare()
        folder = self.bench.out / self.name
        if samples is not None:
            steps = math.ceil(samples / ready["batch"])
        else:
            steps = self.steps_for(cpu_seconds)
        run = folder / f"seed{seed}_{steps}"
        if run.exists():
            shutil.rmtree(run)  # of a run of the bench that was interrupted
        train_s, told = self.train(steps, seed, run)
        masks = run.with_name(f"{run.name}_masks")
        predict_s = self.predict(run, masks)
        return (
            told
            | ready
            | {"steps": steps, "train_cpu_s": round(train_s), "predict_cpu_s": round(predict_s)}
            | self.score(masks)
        )

    def steps_for(self, cpu_seconds: float) -> int:
        """From the cost of a short and of a longer training; kept, so that all seeds do the same number."""
        file = self.bench.out / self.name / "cost.json"
        if not file.is_file():
            few, more = 10, 50
            start, end = (
                self.train(steps, 0, self.bench.out / self.name / f"cost_{steps}")[0] for steps in (few, more)
            )
            a_step = max(1e-6, (end - start) / (more - few))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"step_cpu_s": a_step, "start_cpu_s": max(0.0, start - few * a_step)}))
        cost = json.loads(file.read_text())
        return max(1, int((cpu_seconds - cost["start_cpu_s"]) / cost["step_cpu_s"]))

    def score(self, masks: Path) -> dict[str, float]:
        truth = self.bench.out / "truth"
        truth.mkdir(exist_ok=True)
        for case_id in self.bench.split["test"]:
            if not (truth / f"{case_id}.nii.gz").exists():
                (truth / f"{case_id}.nii.gz").symlink_to(
                    (self.bench.source / "labelsTr" / f"{case_id}.nii.gz").resolve()
                )
        out = masks.with_name(f"{masks.name}_scores")
        run_logged(self.bench.out, "score", liverseg("score", masks, truth, "--out", out, "--no-pictures"))
        summary = json.loads((out / "summary.json").read_text())
        found = summary["tumour"]["detection"]["iou_0"]
        values = (
            summary["liver"]["dice_per_case"],
            summary["tumour"]["dice_per_case"],
            summary["tumour"]["dice_global"],
            found["recall"],
            found["precision"],
        )
        return {name: round(value or 0.0, 4) for name, value in zip(FIGURES, values, strict=True)}


class Ours(System):
    def prepare(self) -> dict[str, Any]:
        self.store = self.bench.out / "store.zarr"
        convert = liverseg("convert", self.bench.source, self.store, "--config", self.bench.config)
        self.bench.split  # noqa: B018 - writes the file
        seconds, _ = run_logged(self.bench.out, "convert", [*convert, "--splits", str(self.bench.out / "split.json")])
        settings = yaml.safe_load(self.bench.config.read_text())
        batch = settings["train"]["global_batch_size"]
        for override in self.bench.overrides:
            if override.startswith("train.global_batch_size="):
                batch = int(override.split("=")[1])
        return {"prepare_cpu_s": round(seconds), "batch": batch, "overrides": list(self.bench.overrides)}

    def train(self, steps: int, seed: int, run: Path) -> tuple[float, dict[str, Any]]:
        settings = (
            f"data.store={self.store}",
            f"run.dir={run}",
            "data.fold=all",
            f"seed={seed}",
            f"train.max_steps={steps}",
        )
        command = liverseg("train", "--config", self.bench.config, *self.bench.overrides, *settings)
        seconds, _ = run_logged(self.bench.out, f"{self.name}_train", command)
        return seconds, {}

    def predict(self, run: Path, out: Path) -> float:
        images = [self.bench.image(case_id) for case_id in self.bench.split["test"]]
        return run_logged(self.bench.out, f"{self.name}_predict", liverseg("predict", run, *images, "--out", out))[0]


class NnUnet(System):
    def __init__(self, bench: Bench) -> None:
        super().__init__(bench, "nnunet")
        self.folder = bench.out / "nnunet"
        self.environment = {
            "nnUNet_raw": str(self.folder / "raw"),
            "nnUNet_preprocessed": str(self.folder / "preprocessed"),
            "nnUNet_results": str(self.folder / "results"),
            "nnUNet_n_proc_DA": "1",
            "nnUNet_compile": "f",
        }

    def prepare(self) -> dict[str, Any]:
        done = self.folder / "prepared.json"
        if not done.is_file():
            self._lay_out()
            size = {"base_features": self.bench.base_features, "memory_gb": self.bench.memory_gb}
            seconds, told = self._job("prepare", **size)
            done.write_text(json.dumps({"prepare_cpu_s": round(seconds)} | told))
        return json.loads(done.read_text())

    def _lay_out(self) -> None:
        raw = self.folder / "raw" / DATASET
        for name in ("imagesTr", "labelsTr", "imagesTs"):
            (raw / name).mkdir(parents=True, exist_ok=True)
        split = self.bench.split
        train = sorted(case_id for fold in split["folds"] for case_id in fold)
        for case_id in train:
            link(raw / "imagesTr" / f"{case_id}_0000.nii.gz", self.bench.image(case_id))
            link(raw / "labelsTr" / f"{case_id}.nii.gz", self.bench.source / "labelsTr" / f"{case_id}.nii.gz")
        for case_id in split["test"]:
            link(raw / "imagesTs" / f"{case_id}_0000.nii.gz", self.bench.image(case_id))
        described = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "liver": 1, "tumour": 2},
            "numTraining": len(train),
            "file_ending": ".nii.gz",
        }
        (raw / "dataset.json").write_text(json.dumps(described))

    def train(self, steps: int, seed: int, run: Path) -> tuple[float, dict[str, Any]]:
        seconds, told = self._job("train", iterations=steps, seed=seed)
        model = Path(told.pop("model"))
        run.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(model, run)
        return seconds, told

    def predict(self, run: Path, out: Path) -> float:
        images = sorted(str(path) for path in (self.folder / "raw" / DATASET / "imagesTs").iterdir())
        return self._job("predict", model=str(run), inputs=images, out=str(out))[0]

    def _job(self, stage: str, **options: Any) -> tuple[float, dict[str, Any]]:
        command = [
            sys.executable,
            str(Path(__file__).with_name("nnunet_job.py")),
            json.dumps({"stage": stage} | options),
        ]
        seconds, output = run_logged(self.bench.out, f"nnunet_{stage}", command, self.environment)
        return seconds, json.loads(output.strip().splitlines()[-1])


def liverseg(*words: object) -> list[str]:
    return [sys.executable, "-m", "liverseg_dist", *map(str, words)]


def run_logged(
    out: Path, name: str, command: list[str], environment: dict[str, str] | None = None
) -> tuple[float, str]:
    """CPU seconds of the command with all its children, and what it printed; a failure ends the bench."""
    log = out / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("w") as errors:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | (environment or {}), check=False
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        sys.exit(f"{name} failed with exit code {done.returncode}; see {log}\n{log.read_text()[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def link(path: Path, to: Path) -> None:
    if not path.is_symlink():
        path.symlink_to(to.resolve())


def rows_of(out: Path) -> list[dict[str, Any]]:
    file = out / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def print_table(rows: list[dict[str, Any]]) -> None:
    """Mean and standard deviation over seeds."""
    print(
        f"\n{'system':16} {'budget':14} seeds {'steps':>7} {'CPU s':>7}  "
        + "  ".join(f"{name:>19}" for name in FIGURES)
    )
    for system, budget in dict.fromkeys((row["system"], row["budget"]) for row in rows):
        ours = [row for row in rows if (row["system"], row["budget"]) == (system, budget)]
        shown = []
        for name in FIGURES:
            values = [row[name] for row in ours]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            shown.append(f"{statistics.mean(values):.3f}{spread}")
        cpu_s = statistics.mean(row["train_cpu_s"] for row in ours)
        print(
            f"{system:16} {budget:14} {len(ours):5} {ours[0]['steps']:7} {cpu_s:7.0f}  "
            + "  ".join(f"{text:>19}" for text in shown)
        )


if __name__ == "__main__":
    main()
