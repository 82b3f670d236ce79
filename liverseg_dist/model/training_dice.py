"""Dice of training patches from voxel counts, as nnU-Net's pseudo Dice.

It is logged during training; validation and evaluation compute Dice of complete cases.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from liverseg_dist.labels import IGNORE
from liverseg_dist.model.losses.terms import one_hot
from liverseg_dist.model.outputs import class_probabilities, labels_from_logits


@torch.no_grad()
def overlap_counts(outputs: Tensor | Sequence[Tensor], label_BDHW: Tensor, regions: bool) -> Tensor:
    """Count true positives, false positives and false negatives of liver and tumour.

    The liver includes its tumours; padding is not counted. Counts are sums over samples, so those
    of several ranks and steps can be added.

    Args:
        outputs: logits (B, C, D, H, W), or a list of them, full resolution first.
        label_BDHW: uint8.
        regions: whether channels are regions instead of classes.

    Returns:
        int64 (2, 3): liver and tumour, three counts each.
    """
    # Only the full resolution is scored.
    logits = outputs if isinstance(outputs, Tensor) else outputs[0]
    known = (label_BDHW != IGNORE).unsqueeze(1)
    labels = labels_from_logits(class_probabilities(logits, regions), regions)
    predicted = one_hot(labels, True, torch.bool) & known
    truth = one_hot(label_BDHW, True, torch.bool)
    counts = [(predicted & truth), (predicted & ~truth), (truth & ~predicted)]
    return torch.stack([mask.sum(dim=(0, 2, 3, 4)) for mask in counts], dim=1)


def dice_from_counts(counts: Tensor) -> Tensor:
    """Return Dice from counts (..., 3); NaN where neither truth nor prediction has a voxel."""
    true, false_positive, false_negative = counts.double().unbind(-1)
    return 2 * true / (2 * true + false_positive + false_negative)
