"""Losses against class imbalance.

All are computed in float32 and ignore voxels labelled 255 (padding). Each is a mean over samples,
so the mean over micro-batches of equal size is the value of the whole batch; only `batch_dice`
couples the samples of a micro-batch.
"""

from liverseg_dist.model.losses.class_weights import class_weights, frequency_weights
from liverseg_dist.model.losses.combined import LossResult, SegmentationLoss, build_loss

__all__ = ["LossResult", "SegmentationLoss", "build_loss", "class_weights", "frequency_weights"]
