"""Conversion of logits to probabilities and labels, for classes (softmax) and regions (sigmoid).

Used by `inference.sliding_window` and `training_dice`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from liverseg_dist.labels import LITS_SCHEME, LabelScheme, Structure

LOG2_E = math.log2(math.e)
MAX_UNSHIFTED_LOG_ODDS = 16.0
"""Up to here exp() in float32 gives probabilities to 1e-6 without subtraction of the maximum."""


@dataclass(frozen=True)
class OutputChannels:
    """What the output channels of a network mean.

    Attributes:
        labels: Scheme of the labels; its class values are 0, 1, 2, ...
        regions: Whether the channels are the structures of the scheme, which may overlap (sigmoid),
            instead of its classes, which exclude each other (softmax).
    """

    labels: LabelScheme = LITS_SCHEME
    regions: bool = False

    @property
    def count(self) -> int:
        """Channels of the logits: classes with the background, or structures."""
        return len(self.labels.structures) if self.regions else self.labels.num_classes

    @property
    def channel_values(self) -> tuple[tuple[int, ...], ...]:
        """The class values that each channel of the logits stands for."""
        if self.regions:
            return tuple(structure.values for structure in self.labels.structures)
        return tuple((value,) for value in range(self.labels.num_classes))

    @property
    def foreground_count(self) -> int:
        """Channels without the background, which only classes have."""
        return self.count if self.regions else self.count - 1

    def foreground_channels(self, structure: Structure) -> tuple[int, ...]:
        """The foreground channels whose probabilities add up to that of a structure."""
        if self.regions:
            return (self.labels.structures.index(structure),)
        return tuple(value - 1 for value in structure.values)


def class_probabilities(logits_BCDHW: Tensor, regions: bool) -> Tensor:
    """Return float32 probabilities of the same shape.

    Classes sum to 1; regions are independent of each other.
    """
    logits = logits_BCDHW.float()
    return torch.sigmoid(logits) if regions else torch.softmax(logits, dim=1)


def log_odds(logits_BCDHW: Tensor, regions: bool) -> Tensor:
    """Return the log odds (B, F, D, H, W) float32 of the foreground channels.

    Classes are relative to the background, regions to everything outside of them. The log odds have
    the information of the logits in one channel less; their mean over windows is that of the
    logits.
    """
    if regions:
        return logits_BCDHW.float()
    logits = logits_BCDHW.float()
    return torch.sub(logits[:, 1:], logits[:, :1])


def foreground_probabilities_(log_odds_BFDHW: Tensor, regions: bool) -> Tensor:
    """Replace the log odds of the foreground by `class_probabilities`, in place.

    Powers of two are twice as fast as powers of e on a CPU. There the subtraction of the maximum is
    left out if nothing can overflow.
    """
    if regions:
        return log_odds_BFDHW.sigmoid_()
    odds = log_odds_BFDHW
    background: Tensor | float = 1.0
    # `not <=` and not `>`: it is true also for NaN. On a GPU the comparison would wait for the
    # device.
    if odds.device.type != "cpu" or not odds.amax() <= MAX_UNSHIFTED_LOG_ODDS:
        highest = odds.amax(dim=1, keepdim=True).clamp_(min=0)
        odds.sub_(highest)
        background = highest.mul_(-LOG2_E).exp2_()
    odds.mul_(LOG2_E).exp2_()
    # Two channels are added at once; `sum` would use another order, and so other last bits.
    total = odds[:, :1].add(odds[:, 1:]) if odds.shape[1] == 2 else odds.sum(dim=1, keepdim=True)
    return odds.mul_(total.add_(background).reciprocal_())


def labels_from_logits(probabilities_BCDHW: Tensor, outputs: OutputChannels) -> Tensor:
    """Return uint8 class values (B, D, H, W).

    For classes it is the most likely class, of equals the lowest. For regions see `paint_regions`.
    """
    if outputs.regions:
        return paint_regions(probabilities_BCDHW >= 0.5, outputs.labels)
    if probabilities_BCDHW.shape[1] == 3:
        # The same as argmax, also for equal values, but 18 times faster on a CPU.
        background, first, second = probabilities_BCDHW.unbind(dim=1)
        label = (first > background).to(torch.uint8)
        return label.masked_fill_(second > torch.maximum(background, first), 2)
    return probabilities_BCDHW.argmax(dim=1).to(torch.uint8)


def paint_regions(inside_BSDHW: Tensor, labels: LabelScheme) -> Tensor:
    """Return uint8 class values (B, D, H, W) of overlapping regions.

    Regions are painted in `LabelScheme.paint_order`. A voxel belongs to a structure that lies
    inside another one only where it belongs to both.

    Args:
        inside_BSDHW: bool, one channel for each structure of the scheme.
        labels: the scheme.
    """
    label = torch.zeros_like(inside_BSDHW[:, 0], dtype=torch.uint8)
    names = labels.structure_names
    for index, value in labels.paint_order:
        inside = inside_BSDHW[:, index]
        container = labels.structures[index].inside
        while container is not None:
            inside = inside & inside_BSDHW[:, names.index(container)]
            container = labels.structure(container).inside
        label.masked_fill_(inside, value)
    return label
