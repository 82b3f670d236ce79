"""Normalisation of intensities: the one function that training and inference share.

A network must see the same values for the same stored voxels while it is trained, validated and applied.
So `data.augment` (training) and `inference.sliding_window` (validation and prediction) both call
`normalise_intensity`.
"""

import torch


def normalise_intensity(
    hu: torch.Tensor, lower_hu: float, upper_hu: float, mean: float, std: float
) -> torch.Tensor:
    """Clip to [lower_hu, upper_hu], map to [0, 1], then subtract `mean` and divide by `std`.

    Args:
        hu: intensities in HU, any shape and type; not changed.
        lower_hu: lower clipping bound in HU.
        upper_hu: upper clipping bound in HU.
        mean: mean of the values in [0, 1] (see `config.IntensityConfig`).
        std: standard deviation of the values in [0, 1].

    Returns:
        A new float32 tensor of the same shape.
    """
    # Always a copy: the caller's voxels may be a view of the scan.
    return normalise_intensity_(hu.to(torch.float32, copy=True), lower_hu, upper_hu, mean, std)


def normalise_intensity_(
    values: torch.Tensor, lower_hu: float, upper_hu: float, mean: float, std: float
) -> torch.Tensor:
    """Do the same as `normalise_intensity` in place, on a float32 tensor."""
    # One factor for both divisions: a pass over the voxels less.
    scale = 1.0 / ((upper_hu - lower_hu) * std)
    return values.clamp_(lower_hu, upper_hu).sub_(lower_hu).mul_(scale).sub_(mean / std)
