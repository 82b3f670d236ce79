"""The two systems that `accuracy.py` compares. Each prepares the data, measures the time of a step, trains and predicts."""

import filecmp
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liverseg_dist.config import Settings, load_settings
from liverseg_dist.data.io.nifti import read_nifti, write_mask
from liverseg_dist.data.splits import build_nnunet_folds
from liverseg_dist.inference.postprocess import postprocess_mask

DATASET = "Dataset003_Liver"
PROBES = {"cpu": (10, 50), "cuda": (100, 500)}
"""Steps of the two trainings from which the time of a step is computed."""


@dataclass(frozen=True)
class Bench:
    """One data set, one split, one folder."""

    out: Path
    source: Path
    config: Path
    overrides: tuple[str, ...]
    test_share: float
    fold: int | None
    device: str
    trainer: str
    base_features: int | None
    memory_gb: float | None
    spacing_mm: tuple[float, ...] | None
    """nnU-Net's; None: its own choice."""

    @property
    def split(self) -> dict[str, Any]:
        """A fold of nnU-Net's or every n-th case is tested; the rest trains. Written once, so that it stays."""
        file = self.out / "split.json"
        if not file.is_file():
            names = sorted(
                path.name.removesuffix(".nii.gz")
                for path in (self.source / "labelsTr").glob("*.nii.gz")
            )
            test = names[:: max(2, round(1 / self.test_share))]
            if self.fold is not None:
                test = list(build_nnunet_folds(names)[self.fold])
            train = [name for name in names if name not in test]
            file.write_text(json.dumps({"test": test, "folds": [train[::2], train[1::2]]}))
        return json.loads(file.read_text())

    @property
    def settings(self) -> Settings:
        return load_settings([self.config], self.overrides)

    def image(self, case_id: str) -> Path:
        return self.source / "imagesTr" / f"{case_id}.nii.gz"

    def timed(
        self, name: str, command: list[str], environment: dict[str, str] | None = None
    ) -> tuple[float, str]:
        """Seconds (CPU seconds with all children, or on the clock with a GPU), and what the command printed."""
        cpu_s, clock_s, output = run_logged(self.out, name, command, environment)
        return (cpu_s if self.device == "cpu" else clock_s), output


class System:
    def __init__(self, bench: Bench, name: str) -> None:
        self.bench, self.name = bench, name

    def prepare(self) -> dict[str, Any]:
        """What is known of the preparation: `prepare_s`, `batch` and more."""
        raise NotImplementedError

    def train(self, steps: int, seed: int, run: Path) -> tuple[float, dict[str, Any]]:
        """Seconds, and what else is known."""
        raise NotImplementedError

    def predict(self, run: Path, out: Path) -> float:
        raise NotImplementedError

    def cleaned(self, masks: Path) -> dict[str, Path]:
        """More folders of masks to score, by suffix of the system's name."""
        return {}

    def run(
        self, seed: int, seconds: float, samples: int | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What was done, and the summaries of `liverseg score` by what was done to the masks ("": nothing)."""
        ready = self.prepare()
        steps = self.steps_for(seconds) if samples is None else math.ceil(samples / ready["batch"])
        run = self.bench.out / self.name / f"seed{seed}_{steps}"
        trained = run.with_name(f"{run.name}_trained.json")
        if not trained.is_file():
            if run.exists():
                shutil.rmtree(run)  # of a run of the bench that was interrupted
            trained.write_text(json.dumps(self.train(steps, seed, run)))
        train_s, facts = json.loads(trained.read_text())
        masks = run.with_name(f"{run.name}_masks")
        predict_s = self.predict(run, masks)
        done = {"steps": steps, "samples": steps * ready["batch"], "device": self.bench.device}
        done |= {"train_s": round(train_s), "predict_s": round(predict_s)}
        folders = {"": masks} | self.cleaned(masks)
        return ready | done | facts, {what: self.score(folder) for what, folder in folders.items()}

    def steps_for(self, seconds: float) -> int:
        """From the cost of a short and of a longer training; kept, so that all seeds do the same number."""
        file = self.bench.out / self.name / "cost.json"
        if not file.is_file():
            few, more = PROBES[self.bench.device]
            start, end = (
                self.train(steps, 0, self.bench.out / self.name / f"cost_{steps}")[0]
                for steps in (few, more)
            )
            a_step = max(1e-6, (end - start) / (more - few))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(
                json.dumps({"step_s": a_step, "start_s": max(0.0, start - few * a_step)})
            )
        cost = json.loads(file.read_text())
        return max(1, int((seconds - cost["start_s"]) / cost["step_s"]))

    def score(self, masks: Path) -> dict[str, Any]:
        truth = self.bench.out / "truth"
        truth.mkdir(exist_ok=True)
        for case_id in self.bench.split["test"]:
            link(truth / f"{case_id}.nii.gz", self.bench.source / "labelsTr" / f"{case_id}.nii.gz")
        out = masks.with_name(f"{masks.name}_scores")
        self.bench.timed("score", liverseg("score", masks, truth, "--out", out, "--no-pictures"))
        return json.loads((out / "summary.json").read_text())


class Ours(System):
    def prepare(self) -> dict[str, Any]:
        self.bench.split  # noqa: B018 - writes the file
        cleaning = [
            override for override in self.bench.overrides if override.startswith("convert.")
        ]
        self.store = self.bench.out / (f"{self.name}.zarr" if cleaning else "store.zarr")
        convert = liverseg(
            "convert", self.bench.source, self.store, "--config", self.bench.config, *cleaning
        )
        seconds, _ = self.bench.timed(
            "convert", [*convert, "--splits", str(self.bench.out / "split.json")]
        )
        train = self.bench.settings.train
        return {
            "prepare_s": round(seconds), "batch": train.global_batch_size, "overrides": list(self.bench.overrides)
        }  # fmt: skip

    def train(self, steps: int, seed: int, run: Path) -> tuple[float, dict[str, Any]]:
        settings = (
            f"data.store={self.store}",
            f"run.dir={run}",
            "data.fold=all",
            f"seed={seed}",
            f"train.max_steps={steps}",
        )
        words = (
            "train",
            "--device",
            self.bench.device,
            "--config",
            self.bench.config,
            *self.bench.overrides,
        )
        seconds, _ = self.bench.timed(f"{self.name}_train", liverseg(*words, *settings))
        weights = run / "model.safetensors"
        for other in self.bench.out.glob(
            f"*/{run.name}/{weights.name}"
        ):  # of the same seed and number of steps
            if other != weights and filecmp.cmp(other, weights, shallow=False):
                whose = other.parent.parent.name
                print(
                    f"warning: {self.name} learnt to the byte what {whose} did: no experiment",
                    file=sys.stderr,
                )
        return seconds, {}

    def predict(self, run: Path, out: Path) -> float:
        images = [self.bench.image(case_id) for case_id in self.bench.split["test"]]
        command = liverseg("predict", run, *images, "--device", self.bench.device, "--out", out)
        return self.bench.timed(f"{self.name}_predict", command)[0]


class NnUnet(System):
    def __init__(self, bench: Bench, name: str) -> None:
        super().__init__(bench, name)
        self.folder = bench.out / "nnunet"
        self.environment = {
            "nnUNet_raw": str(self.folder / "raw"),
            "nnUNet_preprocessed": str(self.folder / "preprocessed"),
            "nnUNet_results": str(self.folder / "results"),
        }
        if bench.device == "cpu":
            self.environment |= {"nnUNet_n_proc_DA": "1", "nnUNet_compile": "f"}

    def prepare(self) -> dict[str, Any]:
        done = self.folder / "prepared.json"
        if not done.is_file():
            self._lay_out()
            bench = self.bench
            size = {
                "base_features": bench.base_features,
                "memory_gb": bench.memory_gb,
                "spacing_mm": bench.spacing_mm,
            }
            seconds, facts = self._job("prepare", **size)
            done.write_text(json.dumps({"prepare_s": round(seconds)} | facts))
        return json.loads(done.read_text())

    def _lay_out(self) -> None:
        raw = self.folder / "raw" / DATASET
        for name in ("imagesTr", "labelsTr", "imagesTs"):
            (raw / name).mkdir(parents=True, exist_ok=True)
        split = self.bench.split
        train = sorted(case_id for fold in split["folds"] for case_id in fold)
        for case_id in train:
            link(raw / "imagesTr" / f"{case_id}_0000.nii.gz", self.bench.image(case_id))
            link(
                raw / "labelsTr" / f"{case_id}.nii.gz",
                self.bench.source / "labelsTr" / f"{case_id}.nii.gz",
            )
        for case_id in split["test"]:
            link(raw / "imagesTs" / f"{case_id}_0000.nii.gz", self.bench.image(case_id))
        described = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "liver": 1, "tumour": 2},
            "numTraining": len(train),
            "file_ending": ".nii.gz",
            # The same voxels as with SimpleITK, which not every GPU machine has.
            "overwrite_image_reader_writer": "NibabelIO",
        }
        (raw / "dataset.json").write_text(json.dumps(described))

    def train(self, steps: int, seed: int, run: Path) -> tuple[float, dict[str, Any]]:
        job = {
            "iterations": steps,
            "seed": seed,
            "trainer": self.bench.trainer,
            "device": self.bench.device,
        }
        seconds, facts = self._job("train", **job)
        model = Path(facts.pop("model"))
        run.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(model, run)
        return seconds, facts

    def predict(self, run: Path, out: Path) -> float:
        images = sorted(
            str(path) for path in (self.folder / "raw" / DATASET / "imagesTs").iterdir()
        )
        return self._job(
            "predict", model=str(run), inputs=images, out=str(out), device=self.bench.device
        )[0]

    def cleaned(self, masks: Path) -> dict[str, Path]:
        """The same masks with the clean-up that our config asks for."""
        folder = masks.with_name(f"{masks.name}_cleaned")
        folder.mkdir(exist_ok=True)
        for file in masks.glob("*.nii.gz"):
            mask = read_nifti(file, "label")
            voxels = mask.voxels.copy()
            postprocess_mask(voxels, mask.spacing_mm, self.bench.settings.inference)
            write_mask(folder / file.name, voxels, mask.grid)
        return {" + clean-up": folder}

    def _job(self, stage: str, **options: Any) -> tuple[float, dict[str, Any]]:
        job = json.dumps({"stage": stage} | options)
        command = [sys.executable, str(Path(__file__).with_name("nnunet_job.py")), job]
        seconds, output = self.bench.timed(f"{self.name}_{stage}", command, self.environment)
        return seconds, json.loads(output.strip().splitlines()[-1])


def liverseg(*words: object) -> list[str]:
    return [sys.executable, "-m", "liverseg_dist", *map(str, words)]


def run_logged(
    out: Path, name: str, command: list[str], environment: dict[str, str] | None = None
) -> tuple[float, float, str]:
    """CPU seconds of the command with all its children, seconds on the clock, and what it printed.

    A failure ends the bench.
    """
    log = out / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with log.open("w") as errors:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | (environment or {}),
            check=False,
        )
    clock_s = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        sys.exit(
            f"{name} failed with exit code {done.returncode}; see {log}\n{log.read_text()[-2000:]}"
        )
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, clock_s, done.stdout


def link(path: Path, to: Path) -> None:
    if not path.is_symlink():
        path.symlink_to(to.resolve())
