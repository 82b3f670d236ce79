"""nnU-Net v2 as one process a stage, for `accuracy.py`: its own planner, preprocessing, trainer and predictor.

  python tools/bench/nnunet_job.py '{"stage": "train", ...}'

The folders come from nnU-Net's three environment variables. `prepare` takes base_features and memory_gb (both make its
planner choose a small network); `train` takes iterations and seed; `predict` takes inputs and out.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset, preprocess_dataset
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args

DATASET_ID = 3
CONFIGURATION = "3d_fullres"
ITERATIONS_PER_EPOCH = 25


def prepare(base_features: int, memory_gb: float) -> dict[str, Any]:
    extract_fingerprint_dataset(DATASET_ID, num_processes=1, show_progress_bar=False)
    planner = ExperimentPlanner(DATASET_ID, gpu_memory_target_in_gb=memory_gb)
    planner.UNet_base_num_features = base_features
    plans = planner.plan_experiment()
    preprocess_dataset(DATASET_ID, configurations=(CONFIGURATION,), num_processes=[1], show_progress_bar=False)
    chosen = plans["configurations"][CONFIGURATION]
    return {
        "patch": [int(n) for n in chosen["patch_size"]],
        "batch": int(chosen["batch_size"]),
        "spacing_mm": [round(float(mm), 3) for mm in chosen["spacing"]],
        "features": list(chosen["architecture"]["arch_kwargs"]["features_per_stage"]),
    }


def train(iterations: int, seed: int) -> dict[str, Any]:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the generator that its augmentation draws from
    torch.manual_seed(seed)
    trainer = get_trainer_from_args(str(DATASET_ID), CONFIGURATION, "all", device=torch.device("cpu"))  # type: ignore[arg-type]
    per_epoch = min(iterations, ITERATIONS_PER_EPOCH)
    trainer.num_iterations_per_epoch = per_epoch
    trainer.num_epochs = max(1, round(iterations / per_epoch))
    trainer.num_val_iterations_per_epoch = 1  # it trains on all cases and validates on the same: no use here
    trainer.logger.plot_progress_png = lambda *_: None  # a second of drawing an epoch, which real epochs do not feel
    trainer.run_training()
    return {
        "iterations": trainer.num_epochs * per_epoch,
        "samples": trainer.num_epochs * per_epoch * trainer.batch_size,
        "model": str(Path(trainer.output_folder).parent),
    }


def predict(model: str, inputs: list[str], out: str) -> dict[str, Any]:
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(model, ("all",))
    names = [Path(path).name.removesuffix("_0000.nii.gz") for path in inputs]
    Path(out).mkdir(parents=True, exist_ok=True)
    predictor.predict_from_files_sequential([[path] for path in inputs], [str(Path(out) / name) for name in names])
    return {}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    stage = {"prepare": prepare, "train": train, "predict": predict}[job.pop("stage")]
    print("\n" + json.dumps(stage(**job)))
