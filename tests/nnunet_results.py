"""A result folder as nnU-Net v2 writes it, with random weights, and its networks in plain PyTorch.

The functions compute what PlainConvUNet and ResidualEncoderUNet of dynamic-network-architectures 0.4
do, by the names of their tensors; `tests/model/test_nnunet_folder.py` compares both where that
package is installed.
"""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "Dataset003_Liver/nnUNetTrainer__nnUNetPlans__3d_fullres"
STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
KERNELS = [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
FEATURES = [4, 6, 8]
BLOCKS = {"PlainConvUNet": [2, 2, 2], "ResidualEncoderUNet": [1, 2, 2]}
DECODER_BLOCKS = {"PlainConvUNet": [2, 2], "ResidualEncoderUNet": [1, 1]}
CLASSES = 3
Tensors = dict[str, Tensor]


def make_plans(kind: str = "PlainConvUNet") -> dict[str, Any]:
    """Plans with the third axis of the files in front, as for coronal slices."""
    blocks_key = "n_conv_per_stage" if kind == "PlainConvUNet" else "n_blocks_per_stage"
    plans = {
        "dataset_name": "Dataset003_Liver",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [1, 0, 2],
        "transpose_backward": [1, 0, 2],
        "foreground_intensity_properties_per_channel": {
            "0": {
                "mean": 99.5,
                "std": 37.1,
                "percentile_00_5": -15.0,
                "percentile_99_5": 197.0,
            }
        },
        "configurations": {
            "3d_fullres": {
                "batch_size": 2,
                "patch_size": [8, 16, 24],
                "spacing": [6.0, 4.0, 3.0],
                "normalization_schemes": ["CTNormalization"],
                "use_mask_for_norm": [False],
                "data_identifier": "nnUNetPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": {
                    "is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None,
                },
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_seg_kwargs": {
                    "is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None,
                },
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities_kwargs": {
                    "is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None,
                },
                "batch_dice": False,
                "architecture": {
                    "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
                    "arch_kwargs": {
                        "n_stages": 3,
                        "features_per_stage": FEATURES,
                        "conv_op": "torch.nn.modules.conv.Conv3d",
                        "kernel_sizes": KERNELS,
                        "strides": STRIDES,
                        blocks_key: BLOCKS[kind],
                        "n_conv_per_stage_decoder": DECODER_BLOCKS[kind],
                        "conv_bias": True,
                        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                        "dropout_op": None,
                        "dropout_op_kwargs": None,
                        "nonlin": "torch.nn.LeakyReLU",
                        "nonlin_kwargs": {"inplace": True},
                    },
                    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
                },
            }
        },
    }  # fmt: skip
    # A copy, so that a test can change it.
    return copy.deepcopy(plans)


def make_tensors(kind: str = "PlainConvUNet", seed: int = 3) -> Tensors:
    """Random weights by nnU-Net's names."""
    torch.manual_seed(seed)
    tensors: Tensors = {}

    def conv(name: str, before: int, after: int, kernel: list[int], bias: bool = True) -> None:
        tensors[f"{name}.conv.weight"] = torch.randn(after, before, *kernel) * 0.3
        if bias:
            tensors[f"{name}.conv.bias"] = torch.randn(after)
        tensors[f"{name}.norm.weight"] = torch.randn(after)
        tensors[f"{name}.norm.bias"] = torch.randn(after) * 0.3

    before = 1
    if kind == "ResidualEncoderUNet":
        conv("encoder.stem.convs.0", 1, FEATURES[0], KERNELS[0])
        before = FEATURES[0]
    for level, (width, kernel) in enumerate(zip(FEATURES, KERNELS, strict=True)):
        for block in range(BLOCKS[kind][level]):
            if kind == "PlainConvUNet":
                conv(f"encoder.stages.{level}.0.convs.{block}", before, width, kernel)
            else:
                name = f"encoder.stages.{level}.blocks.{block}"
                conv(f"{name}.conv1", before, width, kernel)
                conv(f"{name}.conv2", width, width, kernel)
                if before != width:
                    skip = int(STRIDES[level] != [1, 1, 1])
                    conv(f"{name}.skip.{skip}", before, width, [1, 1, 1], bias=False)
            before = width
    for number in range(len(FEATURES) - 1):
        level = len(FEATURES) - 2 - number
        width, below = FEATURES[level], FEATURES[level + 1]
        tensors[f"decoder.transpconvs.{number}.weight"] = (
            torch.randn(below, width, *STRIDES[level + 1]) * 0.3
        )
        tensors[f"decoder.transpconvs.{number}.bias"] = torch.randn(width)
        for block in range(DECODER_BLOCKS[kind][number]):
            first = 2 * width if block == 0 else width
            conv(f"decoder.stages.{number}.convs.{block}", first, width, KERNELS[level])
        tensors[f"decoder.seg_layers.{number}.weight"] = torch.randn(CLASSES, width, 1, 1, 1)
        tensors[f"decoder.seg_layers.{number}.bias"] = torch.randn(CLASSES) * 0.3
    return tensors


def compute_logits(tensors: Tensors, image: Tensor) -> Tensor:
    """Logits of the network, in the axis order of the plans."""
    is_plain = "encoder.stem.convs.0.conv.weight" not in tensors

    def conv(name: str, x: Tensor, stride: list[int], active: bool = True) -> Tensor:
        weight = tensors[f"{name}.conv.weight"]
        padding = [edge // 2 for edge in weight.shape[2:]]
        x = F.conv3d(x, weight, tensors.get(f"{name}.conv.bias"), stride, padding)
        x = F.instance_norm(
            x, weight=tensors[f"{name}.norm.weight"], bias=tensors[f"{name}.norm.bias"]
        )
        return F.leaky_relu(x, 0.01) if active else x

    def residual(name: str, x: Tensor, stride: list[int]) -> Tensor:
        shortcut = F.avg_pool3d(x, stride, stride) if stride != [1, 1, 1] else x
        skip = f"{name}.skip.{int(stride != [1, 1, 1])}"
        if f"{skip}.conv.weight" in tensors:
            shortcut = conv(skip, shortcut, [1, 1, 1], active=False)
        x = conv(f"{name}.conv2", conv(f"{name}.conv1", x, stride), [1, 1, 1], active=False)
        return F.leaky_relu(x + shortcut, 0.01)

    kind = "PlainConvUNet" if is_plain else "ResidualEncoderUNet"
    x = image if is_plain else conv("encoder.stem.convs.0", image, [1, 1, 1])
    skips = []
    for level, blocks in enumerate(BLOCKS[kind]):
        for block in range(blocks):
            stride = STRIDES[level] if block == 0 else [1, 1, 1]
            if is_plain:
                x = conv(f"encoder.stages.{level}.0.convs.{block}", x, stride)
            else:
                x = residual(f"encoder.stages.{level}.blocks.{block}", x, stride)
        skips.append(x)
    skips.pop()
    for number, blocks in enumerate(DECODER_BLOCKS[kind]):
        stride = STRIDES[len(FEATURES) - 1 - number]
        name = f"decoder.transpconvs.{number}"
        x = F.conv_transpose3d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], stride)
        x = torch.cat((x, skips.pop()), 1)
        for block in range(blocks):
            x = conv(f"decoder.stages.{number}.convs.{block}", x, [1, 1, 1])
    last = f"decoder.seg_layers.{len(FEATURES) - 2}"
    return F.conv3d(x, tensors[f"{last}.weight"], tensors[f"{last}.bias"])


def write_results(
    folder: Path,
    kind: str = "PlainConvUNet",
    plans: dict[str, Any] | None = None,
    dataset: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write the folder; returns it. `extra` are further entries of the checkpoint."""
    root = folder / NAME
    (root / "fold_0").mkdir(parents=True, exist_ok=True)
    described = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1, "tumour": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
        "licence": "CC-BY-SA 4.0",
    }
    described |= dataset or {}
    plans = plans or make_plans(kind)
    (root / "plans.json").write_text(json.dumps(plans))
    (root / "dataset.json").write_text(json.dumps(described))
    tensors = make_tensors(kind)
    # nnU-Net's modules list each convolution twice, and its decoder the whole encoder.
    copies: Tensors = {}
    for name, tensor in tensors.items():
        if ".conv." in name:
            copies[name.replace(".conv.", ".all_modules.0.")] = tensor
        if ".norm." in name:
            copies[name.replace(".norm.", ".all_modules.1.")] = tensor
    for name, tensor in (tensors | copies).items():
        if name.startswith("encoder."):
            copies[f"decoder.{name}"] = tensor
    checkpoint = {
        "network_weights": tensors | copies,
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01}]},
        "grad_scaler_state": None,
        # Its logger holds numbers of NumPy.
        "logging": {"mean_fg_dice": [np.float64(0.5)], "train_losses": [np.float32(0.1)]},
        "_best_ema": np.float64(0.4),
        "current_epoch": 1,
        "init_args": {
            "plans": plans, "configuration": "3d_fullres", "fold": 0, "dataset_json": described,
            "device": torch.device("cpu"),
        },
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 2),
    } | (extra or {})  # fmt: skip
    torch.save(checkpoint, root / "fold_0" / "checkpoint_final.pth")
    return root
