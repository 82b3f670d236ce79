"""Dice of training patches from voxel counts, as nnU-Net's pseudo Dice.

It is logged during training; validation and evaluation compute Dice of complete cases.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from liverseg_dist.labels import IGNORE
from liverseg_dist.model.losses.terms import one_hot
from liverseg_dist.model.outputs import OutputChannels, class_probabilities, labels_from_logits


@torch.no_grad()
def overlap_counts(
    outputs: Tensor | Sequence[Tensor],
    label_BDHW: Tensor,
    channels: OutputChannels,
    annotated: Sequence[Sequence[str]] | None = None,
) -> Tensor:
    """Count true positives, false positives and false negatives of each structure.

    Padding is not counted, nor is a structure in a case in which it was not annotated. Counts are
    sums over samples, so those of several ranks and steps can be added.

    Args:
        outputs: logits (B, C, D, H, W), or a list of them, full resolution first.
        label_BDHW: uint8.
        channels: meaning of the output channels.
        annotated: names of the annotated structures of each sample's case; None: all.

    Returns:
        int64 (structures, 3): in the order of the scheme, three counts each.
    """
    # Only the full resolution is scored.
    logits = outputs if isinstance(outputs, Tensor) else outputs[0]
    known = (label_BDHW != IGNORE).unsqueeze(1)
    structures = channels.labels.structures
    values = [structure.values for structure in structures]
    labels = labels_from_logits(class_probabilities(logits, channels.regions), channels)
    predicted = one_hot(labels, values, torch.bool) & known
    truth = one_hot(label_BDHW, values, torch.bool)
    for sample, names in enumerate(annotated or ()):
        for row, structure in enumerate(structures):
            if structure.name not in names:
                predicted[sample, row] = truth[sample, row] = False
    counts = [(predicted & truth), (predicted & ~truth), (truth & ~predicted)]
    return torch.stack([mask.sum(dim=(0, 2, 3, 4)) for mask in counts], dim=1)


def dice_from_counts(counts: Tensor) -> Tensor:
    """Return Dice from counts (..., 3); NaN where neither truth nor prediction has a voxel."""
    true, false_positive, false_negative = counts.double().unbind(-1)
    return 2 * true / (2 * true + false_positive + false_negative)
