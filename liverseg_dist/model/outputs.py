"""Conversion of logits to probabilities and labels, for classes (softmax) and regions (sigmoid).

Used by `inference.sliding_window` and `training_dice`.
"""

import math

import torch
from torch import Tensor

from liverseg_dist.labels import LIVER, STRUCTURES, TUMOUR

LOG2_E = math.log2(math.e)
MAX_UNSHIFTED_LOG_ODDS = 16.0
"""Up to here exp() in float32 gives probabilities to 1e-6 without subtraction of the maximum."""


def class_probabilities(logits_BCDHW: Tensor, regions: bool) -> Tensor:
    """Return float32 probabilities of the same shape.

    Classes sum to 1; regions are liver with tumours, and tumour.
    """
    logits = logits_BCDHW.float()
    return torch.sigmoid(logits) if regions else torch.softmax(logits, dim=1)


def log_odds(logits_BCDHW: Tensor, regions: bool) -> Tensor:
    """Return the log odds (B, 2, D, H, W) float32 of liver and tumour.

    Classes are relative to the background, regions to everything outside of them. The log odds have
    the information of the logits in one channel less; their mean over windows is that of the
    logits.
    """
    if regions:
        return logits_BCDHW[:, -len(STRUCTURES) :].float()
    logits = logits_BCDHW.float()
    return torch.sub(logits[:, 1:], logits[:, :1])


def foreground_probabilities_(log_odds_BFDHW: Tensor, regions: bool) -> Tensor:
    """Replace the log odds of liver and tumour by `class_probabilities`, in place.

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
    return odds.mul_(odds[:, :1].add(odds[:, 1:]).add_(background).reciprocal_())


def labels_from_logits(probabilities_BCDHW: Tensor, regions: bool) -> Tensor:
    """Return uint8 labels (B, D, H, W).

    For regions a voxel is tumour if tumour and liver both have a probability of at least 0.5.
    """
    if not regions:
        # The same as argmax over three channels, also for equal values, but 18 times faster on a
        # CPU.
        background, liver, tumour = probabilities_BCDHW.unbind(dim=1)
        label = (liver > background).to(torch.uint8)
        return label.masked_fill_(tumour > torch.maximum(background, liver), TUMOUR)
    liver, tumour = probabilities_BCDHW[:, 0] >= 0.5, probabilities_BCDHW[:, 1] >= 0.5
    label = liver.to(torch.uint8) * LIVER
    return label.masked_fill(liver & tumour, TUMOUR)
