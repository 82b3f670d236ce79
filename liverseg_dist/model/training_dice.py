"""Voxel counts of the scored structures, for Dice curves while training: of patches, as nnU-Net's pseudo Dice."""

from collections.abc import Sequence

import torch
from torch import Tensor

from liverseg_dist.labels import IGNORE
from liverseg_dist.model.losses.terms import one_hot
from liverseg_dist.model.outputs import class_probabilities, labels_from_logits


@torch.no_grad()
def overlap_counts(outputs: Tensor | Sequence[Tensor], label_BDHW: Tensor, regions: bool) -> Tensor:
    """int64 (2, 3): true positives, false positives, false negatives of liver (label 1 or 2) and tumour; no padding.

    Sums over samples, so counts of ranks and steps add up. `outputs` as a network in training gives them.
    """
    logits = outputs if isinstance(outputs, Tensor) else outputs[0]
    known = (label_BDHW != IGNORE).unsqueeze(1)
    predicted = (
        one_hot(labels_from_logits(class_probabilities(logits, regions), regions), True, torch.bool)
        & known
    )
    truth = one_hot(label_BDHW, True, torch.bool)
    counts = [(predicted & truth), (predicted & ~truth), (truth & ~predicted)]
    return torch.stack([mask.sum(dim=(0, 2, 3, 4)) for mask in counts], dim=1)


def dice_from_counts(counts: Tensor) -> Tensor:
    """Dice per structure from (..., 3) counts; NaN where neither truth nor prediction has any."""
    true, false_positive, false_negative = counts.double().unbind(-1)
    return 2 * true / (2 * true + false_positive + false_negative)
