"""One stage of nnU-Net v2 as a process, for `accuracy.py`: its planner, preprocessing, trainer or predictor.

  python tools/bench/nnunet_job.py '{"stage": "train", ...}'

The folders are set by nnU-Net's three environment variables. `prepare` takes base_features, memory_gb and spacing_mm
(for a small network; null: the planner's choice); `train` takes iterations, seed, trainer (a class of nnU-Net) and
device; `predict` takes model, inputs, out and device.
"""

import importlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import nnunetv2
import numpy as np
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprint_dataset,
    preprocess_dataset,
)
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.run import run_training

DATASET_ID = 3
CONFIGURATION = "3d_fullres"
ITERATIONS_PER_EPOCH = 25
"""nnU-Net's own 250 in trainings of 40 epochs and more; the learning rate is lowered once an epoch."""
OWN_ITERATIONS_PER_EPOCH = 250


def prepare(
    base_features: int | None, memory_gb: float | None, spacing_mm: list[float] | None
) -> dict[str, Any]:
    extract_fingerprint_dataset(DATASET_ID, num_processes=1, show_progress_bar=False)
    target = {} if memory_gb is None else {"gpu_memory_target_in_gb": memory_gb}
    planner = ExperimentPlanner(DATASET_ID, overwrite_target_spacing=spacing_mm, **target)  # type: ignore[arg-type]
    if base_features is not None:
        planner.UNet_base_num_features = base_features
    plans = planner.plan_experiment()
    preprocess_dataset(
        DATASET_ID, configurations=(CONFIGURATION,), num_processes=[1], show_progress_bar=False
    )
    chosen = plans["configurations"][CONFIGURATION]
    return {
        "patch": [int(n) for n in chosen["patch_size"]],
        "batch": int(chosen["batch_size"]),
        "spacing_mm": [round(float(mm), 3) for mm in chosen["spacing"]],
        "features": list(chosen["architecture"]["arch_kwargs"]["features_per_stage"]),
    }


def train(iterations: int, seed: int, trainer: str, device: str) -> dict[str, Any]:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the generator that its augmentation draws from
    torch.manual_seed(seed)
    chosen = run_training.get_trainer_from_args(
        str(DATASET_ID),
        CONFIGURATION,
        "all",
        trainer,
        device=torch.device(device),  # type: ignore[arg-type]
    )
    usual = (
        ITERATIONS_PER_EPOCH
        if iterations < 40 * OWN_ITERATIONS_PER_EPOCH
        else OWN_ITERATIONS_PER_EPOCH
    )
    per_epoch = min(iterations, usual)
    chosen.num_iterations_per_epoch = per_epoch
    chosen.num_epochs = max(1, round(iterations / per_epoch))
    chosen.num_val_iterations_per_epoch = (
        1  # it trains on all cases and validates on the same: no use here
    )
    chosen.logger.plot_progress_png = lambda *_: (
        None
    )  # a second of drawing an epoch, which real epochs do not feel
    chosen.run_training()
    return {
        "iterations": chosen.num_epochs * per_epoch,
        "samples": chosen.num_epochs * per_epoch * chosen.batch_size,
        "model": str(Path(chosen.output_folder).parent),
    }


def predict(model: str, inputs: list[str], out: str, device: str) -> dict[str, Any]:
    predictor = predict_from_raw_data.nnUNetPredictor(device=torch.device(device), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(model, ("all",))
    names = [Path(path).name.removesuffix("_0000.nii.gz") for path in inputs]
    Path(out).mkdir(parents=True, exist_ok=True)
    predictor.predict_from_files_sequential(
        [[path] for path in inputs], [str(Path(out) / name) for name in names]
    )
    return {}


def trainer_class(name: str) -> Any:
    """One of nnU-Net's own. Its search imports every trainer on the way, some of which need packages that others do
    not (timm, torchvision); this one imports the file that holds the class."""
    root = Path(nnunetv2.__path__[0])
    for file in sorted((root / "training" / "nnUNetTrainer").rglob("*.py")):
        if f"class {name}(" in file.read_text(encoding="utf-8"):
            module = ".".join(("nnunetv2", *file.relative_to(root).with_suffix("").parts))
            return getattr(importlib.import_module(module), name)
    sys.exit(f"--nnunet-trainer {name}: nnU-Net has no such trainer")


if __name__ == "__main__":
    for user in (run_training, predict_from_raw_data):
        user.recursive_find_trainer_class_by_name = trainer_class
    job = json.loads(sys.argv[1])
    stage = {"prepare": prepare, "train": train, "predict": predict}[job.pop("stage")]
    print("\n" + json.dumps(stage(**job)))
