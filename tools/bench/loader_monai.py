"""MONAI's data sets with nnU-Net's augmentation, for `loader.py`."""

import math
import warnings
from pathlib import Path

import torch
from loader_peers import INTENSITY, Case, cpu_ms

from liverseg_dist.data.augment import normalise_intensity
from liverseg_dist.volume import Index3

warnings.simplefilter("ignore")
import monai.transforms as mt  # noqa: E402  (warns while it is imported)
from monai.data import CacheDataset, PersistentDataset  # noqa: E402


def time_monai(
    cases: list[Case],
    patch: Index3,
    count: int,
    *,
    cached_indices: bool = False,
    disk: Path | None = None,
) -> float:
    """CacheDataset, or with a folder PersistentDataset, whose cases lie there as it wrote them."""
    keys, angle = ("image", "label"), math.radians(30)
    mode = ("bilinear", "nearest")
    cached: list = [mt.FgBgToIndicesd("label")] if cached_indices else [mt.Identityd(keys)]
    indices = (
        {"fg_indices_key": "label_fg_indices", "bg_indices_key": "label_bg_indices"}
        if cached_indices
        else {}
    )
    randomly: list = [
        mt.RandCropByPosNegLabeld(
            keys, label_key="label", spatial_size=patch, pos=1, neg=2, num_samples=1, **indices
        ),
        mt.RandAffined(
            keys,
            prob=1 - 0.8 * 0.8,
            rotate_range=(angle,) * 3,
            scale_range=((-0.3, 0.4),) * 3,
            mode=mode,
            padding_mode="zeros",
        ),
        mt.RandGaussianNoised("image", prob=0.1, std=0.1),
        mt.RandGaussianSmoothd("image", (0.5, 1.0), (0.5, 1.0), (0.5, 1.0), prob=0.1),
        mt.RandScaleIntensityd("image", 0.25, prob=0.15),
        mt.RandScaleIntensityFixedMeand("image", factors=0.25, preserve_range=True, prob=0.15),
        mt.RandSimulateLowResolutiond("image", prob=0.125, zoom_range=(0.5, 1.0)),
        mt.RandAdjustContrastd(
            "image", prob=0.1, gamma=(0.7, 1.5), invert_image=True, retain_stats=True
        ),
        mt.RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
        *[mt.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)],
    ]
    statistics = INTENSITY.model_dump().values()
    data = [
        {
            "image": normalise_intensity(torch.from_numpy(image), *statistics)[None],
            "label": torch.from_numpy(label)[None],
        }
        for image, label in cases
    ]
    transform = mt.Compose([*cached, *randomly]).set_random_state(0)
    dataset: CacheDataset | PersistentDataset
    if disk is None:
        dataset = CacheDataset(data, transform, num_workers=1, progress=False)
    else:
        dataset = PersistentDataset(data, transform, cache_dir=disk)
        for number in range(len(dataset)):
            dataset[number]
    return cpu_ms(lambda i: dataset[i % len(dataset)], count)
