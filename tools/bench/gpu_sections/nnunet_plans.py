"""A preprocessed data set and a plan of nnU-Net with the patch, batch and network of this project.

nnU-Net's planner would choose another patch. The plan is written directly, in the format of nnU-Net
2.x; the voxels are those of the store, normalised, in nnU-Net's blosc2 format.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from liverseg_dist.config import Settings
from liverseg_dist.data.intensity import normalise_intensity
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.labels import IGNORE

DATASET, CONFIGURATION, IDENTIFIER = "Dataset900_Bench", "3d_fullres", "bench_3d_fullres"
DATASET_JSON = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, "tumour": 2},
    "numTraining": 1,
    "file_ending": ".nii.gz",
}
MAX_PLACES = 10_000
"""Foreground voxels of a class that nnU-Net keeps for its sampling."""
RESAMPLING = "resample_data_or_seg_to_shape"


def set_environment(work: Path) -> None:
    """Set nnU-Net's folders. Before nnunetv2 is imported, which reads them once."""
    for name in ("raw", "preprocessed", "results"):
        folder = work / "nnunet" / name
        folder.mkdir(parents=True, exist_ok=True)
        set_nnunet_variable(name, folder)


def set_nnunet_variable(name: str, value: object) -> None:
    """Set one of nnU-Net's environment variables, which are not in capitals."""
    os.environ[f"nnUNet_{name}"] = str(value)


def build_plans(settings: Settings) -> dict[str, Any]:
    """Return nnU-Net's plans for resolved settings."""
    model, data = settings.model, settings.data
    assert model.features
    assert model.kernels
    assert model.strides
    assert isinstance(model.blocks_per_level, tuple)
    levels = len(model.features)
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": levels,
            "features_per_stage": list(model.features),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [list(kernel) for kernel in model.kernels],
            "strides": [list(stride) for stride in model.strides],
            "n_conv_per_stage": list(model.blocks_per_level),
            "n_conv_per_stage_decoder": list(model.blocks_per_level[:-1]),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    spacing_mm = list(data.spacing_mm or (1.0, 1.0, 1.0))
    configuration = {
        "data_identifier": IDENTIFIER,
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": settings.train.micro_batch_size,
        "patch_size": list(data.patch_size),
        "median_image_size_in_voxels": list(data.patch_size),
        "spacing": spacing_mm,
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": RESAMPLING,
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg": RESAMPLING,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": RESAMPLING,
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
        "architecture": architecture,
        "batch_dice": False,
    }
    values = {"mean": 100.0, "std": 40.0, "percentile_00_5": -17.0, "percentile_99_5": 201.0}
    return {
        "dataset_name": DATASET,
        "plans_name": "benchPlans",
        "original_median_spacing_after_transp": spacing_mm,
        "original_median_shape_after_transp": list(data.patch_size),
        "image_reader_writer": "NibabelIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {CONFIGURATION: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": values},
        "continue_training": False,
    }


def write_preprocessed(work: Path, settings: Settings, store: CaseStore) -> None:
    """Write the training cases of the store as nnU-Net's preprocessed data set."""
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

    folder = work / "nnunet" / "preprocessed" / DATASET
    cases = folder / IDENTIFIER
    cases.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_fingerprint.json").write_text("{}")
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON))
    for case_id in store.ids("train", settings.data.fold):
        meta = store.meta(case_id)
        image = torch.from_numpy(np.asarray(store.image(case_id)[0]))
        values = meta.intensities[0]
        normalised = normalise_intensity(
            image, values.lower_hu, values.upper_hu, values.mean, values.std
        ).numpy()[None]
        label = np.asarray(store.label(case_id)).astype(np.int8)
        label[np.asarray(store.label(case_id)) == IGNORE] = 0
        places = {value: _find_places(label, value) for value in (1, 2)}
        blocks, chunks = comp_blosc2_params(normalised.shape, settings.data.patch_size)
        nnUNetDatasetBlosc2.save_case(
            normalised,
            label[None],
            {"class_locations": places},
            str(cases / case_id),
            chunks=chunks,
            blocks=blocks,
        )


def _find_places(label_DHW: np.ndarray, value: int) -> np.ndarray:
    """Coordinates (channel, z, y, x) of voxels of a class, some of them where there are many."""
    found = np.argwhere(label_DHW == value)
    if len(found) > MAX_PLACES:
        found = found[np.random.default_rng(0).permutation(len(found))[:MAX_PLACES]]
    return np.c_[np.zeros(len(found), int), found]
