"""The single terms of the losses. Shapes: logits and one-hot targets (B, C, D, H, W), labels (B, D, H, W) uint8."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from liverseg_dist.labels import IGNORE, LIVER, NUM_CLASSES, TUMOUR

SMOOTH = 1e-5
"""Added above and below the ratios: a class that is in neither truth nor prediction scores 1 and pulls nowhere; one
that the truth lacks but the prediction has scores near 0, as with nnU-Net."""


def tversky_index(
    probability: Tensor, target: Tensor, alpha: float, beta: float, batch: bool
) -> Tensor:
    """Mean over channels (and samples unless `batch`) of TP / (TP + alpha FP + beta FN); 0.5, 0.5 is soft Dice.

    https://arxiv.org/abs/1706.05721; https://arxiv.org/abs/1606.04797. Padding is zero in both inputs.
    """
    axes = (0, 2, 3, 4) if batch else (2, 3, 4)
    true = (probability * target).sum(axes)
    false_positive = probability.sum(axes) - true
    false_negative = target.sum(axes) - true
    return (
        (true + SMOOTH) / (true + alpha * false_positive + beta * false_negative + SMOOTH)
    ).mean()


def class_entropy(log_probability: Tensor, label_BDHW: Tensor, gamma: float) -> Tensor:
    """Softmax (focal) cross-entropy per voxel, (B, D, H, W); 0 on padding. gamma 0: plain.

    Focal: https://arxiv.org/abs/1708.02002.
    """
    entropy = F.nll_loss(log_probability, label_BDHW.long(), ignore_index=IGNORE, reduction="none")
    return _focal(entropy, gamma)


def region_entropy(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Sigmoid (focal) cross-entropy per voxel, mean over regions, (B, D, H, W)."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return _focal(entropy, gamma).mean(dim=1)


def _focal(entropy: Tensor, gamma: float) -> Tensor:
    """Times (1 - p)^gamma, where p is the probability of the truth; with a gradient also where p is 1 and gamma < 1."""
    if gamma == 0:
        return entropy
    return (-torch.expm1(-entropy)).clamp_min(torch.finfo(entropy.dtype).tiny) ** gamma * entropy


def one_hot(label_BDHW: Tensor, regions: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, C, D, H, W): the three classes, or the regions liver (1 or 2) and tumour; padding is all zeros."""
    if regions:
        tumour = label_BDHW == TUMOUR
        return torch.stack([(label_BDHW == LIVER) | tumour, tumour], dim=1).to(dtype)
    return torch.stack([label_BDHW == value for value in range(NUM_CLASSES)], dim=1).to(dtype)


def subsample_label(label_BDHW: Tensor, size: Sequence[int]) -> Tensor:
    """Labels at a lower output's resolution: the voxel that the strided convolutions are centred on."""
    edges = tuple(label_BDHW.shape[1:])
    if edges == tuple(size):
        return label_BDHW
    if all(edge % small == 0 for edge, small in zip(edges, size, strict=True)):
        z, y, x = (edge // small for edge, small in zip(edges, size, strict=True))
        return label_BDHW[:, ::z, ::y, ::x]
    return (
        F.interpolate(label_BDHW.unsqueeze(1).float(), size=tuple(size), mode="nearest")
        .squeeze(1)
        .to(torch.uint8)
    )
