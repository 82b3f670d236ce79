"""The mathematics of the loss terms.

Shapes: logits and one-hot targets (B, C, D, H, W), labels (B, D, H, W) uint8.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from liverseg_dist.labels import IGNORE

SMOOTH = 1e-5
"""Added to numerator and denominator of the ratios.

A class that is absent from truth and prediction has the value 1 and no gradient; one that is absent
from the truth but present in the prediction has a value near 0, as in nnU-Net.
"""


@dataclass(frozen=True, eq=False)
class BatchOverlaps:
    """Sums of `overlap_sums` over all samples of an optimizer step, on all ranks.

    The index of a batch is not a mean over its parts. A part of the batch therefore computes the
    index of the whole batch, of which only its own sums have a gradient.
    """

    sums: Tensor
    """(3, channels), or (levels, 3, channels) for all outputs of a network."""
    share: float
    """Samples of the part, divided by those of the batch. The caller multiplies the loss with it,
    so that the values of all parts add up to one; the gradients must add up to the whole sum."""

    def at_level(self, level: int) -> "BatchOverlaps":
        """Return the sums of one output."""
        return BatchOverlaps(self.sums[level], self.share)

    def with_gradient_of(self, own: Tensor) -> Tensor:
        """Return the sums of the batch with the gradient of this part's own sums."""
        return self.sums.to(own.dtype) + (own - own.detach()) / self.share


def overlap_sums(probability: Tensor, target: Tensor, batch: bool) -> Tensor:
    """Return sums of probability * target, probability and target over voxels: (3, ...).

    Args:
        probability: in [0, 1]; 0 on padding.
        target: 0 or 1; 0 on padding.
        batch: whether voxels of all samples are summed: (3, channels), else (3, samples, channels).
    """
    axes = (0, 2, 3, 4) if batch else (2, 3, 4)
    products = (probability * target).sum(axes)
    return torch.stack([products, probability.sum(axes), target.sum(axes)])


def tversky_index(sums: Tensor, alpha: float, beta: float) -> Tensor:
    """Return the mean over channels (and samples) of the Tversky index.

    TP / (TP + alpha FP + beta FN); with alpha = beta = 0.5 it is the soft Dice coefficient.
    https://arxiv.org/abs/1706.05721 (Tversky); https://arxiv.org/abs/1606.04797 (soft Dice).

    Args:
        sums: of `overlap_sums`.
        alpha: weight of false positives.
        beta: weight of false negatives.
    """
    true_positive, predicted, true = sums.unbind(0)
    false_positive = predicted - true_positive
    false_negative = true - true_positive
    denominator = true_positive + alpha * false_positive + beta * false_negative + SMOOTH
    return ((true_positive + SMOOTH) / denominator).mean()


def class_entropy(log_probability: Tensor, label_BDHW: Tensor, gamma: float) -> Tensor:
    """Return the softmax (focal) cross-entropy per voxel (B, D, H, W); 0 on padding.

    Args:
        log_probability: logarithm of the softmax.
        label_BDHW: class of each voxel.
        gamma: exponent of the focal factor (https://arxiv.org/abs/1708.02002); 0: plain.
    """
    entropy = F.nll_loss(log_probability, label_BDHW.long(), ignore_index=IGNORE, reduction="none")
    return _apply_focal_factor(entropy, gamma)


def region_entropy(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Return the sigmoid (focal) cross-entropy per voxel, mean over regions (B, D, H, W)."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return _apply_focal_factor(entropy, gamma).mean(dim=1)


def _apply_focal_factor(entropy: Tensor, gamma: float) -> Tensor:
    """Multiply by (1 - p)^gamma, where p is the probability of the true class."""
    if gamma == 0:
        return entropy
    # Not below the smallest number: for gamma < 1 the gradient at p = 1 would be infinite.
    wrong = (-torch.expm1(-entropy)).clamp_min(torch.finfo(entropy.dtype).tiny)
    return wrong**gamma * entropy


def one_hot(
    label_BDHW: Tensor,
    channel_values: Sequence[Sequence[int]],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the one-hot label (B, C, D, H, W); padding is 0 in all channels.

    Args:
        label_BDHW: class values.
        channel_values: the class values that each channel stands for
            (`OutputChannels.channel_values`); several for a region.
        dtype: type of the result.
    """
    values = {value for group in channel_values for value in group}
    # Each value is compared once, although it may belong to several regions.
    is_value = {value: label_BDHW == value for value in values}
    masks = []
    for group in channel_values:
        mask = is_value[group[0]]
        for value in group[1:]:
            mask = mask | is_value[value]
        masks.append(mask)
    return torch.stack(masks, dim=1).to(dtype)


def subsample_label(label_BDHW: Tensor, size: Sequence[int]) -> Tensor:
    """Return the label at the resolution of a lower output, of `size` (z, y, x) voxels.

    It takes the voxels on which the strided convolutions are centred.
    """
    shape = tuple(label_BDHW.shape[1:])
    if shape == tuple(size):
        return label_BDHW
    if all(edge % small == 0 for edge, small in zip(shape, size, strict=True)):
        z, y, x = (edge // small for edge, small in zip(shape, size, strict=True))
        return label_BDHW[:, ::z, ::y, ::x]
    label_B1DHW = label_BDHW.unsqueeze(1).float()
    resized = F.interpolate(label_B1DHW, size=tuple(size), mode="nearest")
    return resized.squeeze(1).to(torch.uint8)
