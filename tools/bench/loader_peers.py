"""nnU-Net's transforms and loader, for `loader.py` and `gpu`."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.augmentations.utils import rotate_coords_3d
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform

from liverseg_dist.config import IntensityConfig
from liverseg_dist.data.augment import normalise_intensity
from liverseg_dist.volume import Index3

try:
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
except ImportError:
    nnUNetDataLoader = None

INTENSITY = IntensityConfig(lower_hu=-17, upper_hu=201, mean=0.53, std=0.18)
Case = tuple[np.ndarray, np.ndarray]


def cpu_ms(step: Callable[[int], object], count: int, warm_up: int = 5) -> float:
    """Mean CPU milliseconds of `step(i)`."""
    for i in range(warm_up):
        step(-1 - i)
    started = time.process_time()
    for i in range(count):
        step(i)
    return (time.process_time() - started) / count * 1e3


def field_size(patch: Index3) -> Index3:
    """What nnU-Net crops before it turns (`get_patch_size`): the patch at 30 degrees about each axis, over 0.85."""
    angle = math.pi / 6
    corner = np.array(patch, dtype=np.float64)
    turned = [
        np.abs(rotate_coords_3d(corner, *(angle * (axis == i) for i in range(3))))
        for axis in range(3)
    ]
    depth, rows, columns = (np.max([corner, *turned], axis=0) / 0.85).astype(int).tolist()
    return depth, rows, columns


def nnunet_transforms(patch: Index3) -> ComposeTransforms:
    """As `nnUNetTrainer.get_training_transforms` builds them for an isotropic 3D patch, without deep supervision."""
    quarter, gamma = BGContrast((0.75, 1.25)), BGContrast((0.7, 1.5))
    angle = math.radians(30)
    return ComposeTransforms(
        [
            SpatialTransform(
                patch, 0, random_crop=False, p_rotation=0.2, rotation=(-angle, angle), p_scaling=0.2,
                scaling=(0.7, 1.4), p_synchronize_scaling_across_axes=1,
                border_mode_seg="constant", padding_value_seg=-1,
            ),
            RandomTransform(GaussianNoiseTransform((0, 0.1), 1, True), 0.1),
            RandomTransform(GaussianBlurTransform((0.5, 1.0), False, False, 0.5, benchmark=True), 0.2),
            RandomTransform(MultiplicativeBrightnessTransform(quarter, False, 1), 0.15),
            RandomTransform(ContrastTransform(quarter, True, False, 1), 0.15),
            RandomTransform(SimulateLowResolutionTransform((0.5, 1), False, True, None, p_per_channel=0.5), 0.25),
            RandomTransform(GammaTransform(gamma, 1, False, 1, 1), 0.1),
            RandomTransform(GammaTransform(gamma, 0, False, 1, 1), 0.3),
            MirrorTransform((0, 1, 2)),
            RemoveLabelTansform(-1, 0),
        ]
    )  # fmt: skip


def time_nnunet_transforms(
    cases: list[Case], patch: Index3, count: int, warm_up: int = 30
) -> float:
    """On patches as its loader crops them; warmed up until its blur has chosen its convolution."""
    transforms, size = nnunet_transforms(patch), field_size(patch)
    image = torch.from_numpy(
        np.resize(cases[0][0][:, 100 : 100 + size[1], 100 : 100 + size[2]], size)
    )
    normalised = normalise_intensity(image, *INTENSITY.model_dump().values())[None]
    label = torch.from_numpy(
        np.resize(cases[0][1][:, 100 : 100 + size[1], 100 : 100 + size[2]], size)
    )[None].to(torch.int16)
    seed_peers()
    return cpu_ms(
        lambda i: transforms(image=normalised.clone(), segmentation=label.clone()),
        2 * count,
        warm_up=warm_up,
    )


def time_nnunet_loader(
    folder: Path, cases: list[Case], patch: Index3, count: int, *, is_augmented: bool = True
) -> float:
    """nnU-Net's loader in this process; without augmentation it cuts the patch itself."""
    folder.mkdir()
    for number, (image, label) in enumerate(cases):
        normalised = normalise_intensity(
            torch.from_numpy(image), *INTENSITY.model_dump().values()
        ).numpy()[None]
        places = {
            value: np.c_[np.zeros(1000, int), _sampled(np.argwhere(label == value))]
            for value in (1, 2)
        }
        blocks, chunks = comp_blosc2_params(normalised.shape, patch)
        nnUNetDatasetBlosc2.save_case(
            normalised,
            label[None].astype(np.int8),
            {"class_locations": places},
            str(folder / f"case_{number}"),
            chunks=chunks,
            blocks=blocks,
        )

    class Labels:
        all_labels, has_ignore_label = [1, 2], False

    dataset: Any = nnUNetDatasetBlosc2(str(folder))
    seed_peers()
    cut, transforms = patch, None
    if is_augmented:
        cut, transforms = field_size(patch), nnunet_transforms(patch)
    loader = nnUNetDataLoader(dataset, 2, cut, patch, Labels(), 0.33, transforms=transforms)
    return cpu_ms(lambda i: next(loader), count // 2, warm_up=10) / 2


def seed_peers() -> None:
    np.random.seed(0)  # noqa: NPY002  (they use the global generator)
    torch.manual_seed(0)


def _sampled(voxels: np.ndarray) -> np.ndarray:
    return voxels[np.random.default_rng(0).integers(0, len(voxels), 1000)]
