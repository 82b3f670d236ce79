"""Losses against class imbalance.

All are computed in float32 and ignore voxels labelled 255 (padding). Each is a mean over samples,
so the mean over micro-batches of equal size is the value of the whole batch. Only `batch_dice`
couples the samples; its sums over the whole batch are given to each part (`BatchOverlaps`).
"""

from liverseg_dist.model.losses.class_weights import class_weights, frequency_weights
from liverseg_dist.model.losses.combined import LossResult, SegmentationLoss, build_loss
from liverseg_dist.model.losses.terms import BatchOverlaps

__all__ = [
    "BatchOverlaps",
    "LossResult",
    "SegmentationLoss",
    "build_loss",
    "class_weights",
    "frequency_weights",
]
