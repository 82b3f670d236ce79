"""From logits to probabilities and labels, for classes (softmax) and regions (sigmoid)."""

import math

import torch
from torch import Tensor

from liverseg_dist.labels import LIVER, STRUCTURES, TUMOUR

LOG2_E = math.log2(math.e)
HIGHEST_LOG_ODDS = 16.0
"""Up to here exp() in float32 gives probabilities to 1e-6 without shifting first."""


def class_probabilities(logits_BCDHW: Tensor, regions: bool) -> Tensor:
    """float32, same shape: class probabilities that sum to 1, or region probabilities (liver with tumours, tumour)."""
    logits = logits_BCDHW.float()
    return torch.sigmoid(logits) if regions else torch.softmax(logits, dim=1)


def log_odds(logits_BCDHW: Tensor, regions: bool) -> Tensor:
    """B F D H W float32 of liver and tumour: classes against the background, regions against all outside them.

    All that logits say, in one channel less; their mean over windows is the mean of the logits.
    """
    if regions:
        return logits_BCDHW[:, -len(STRUCTURES) :].float()
    logits = logits_BCDHW.float()
    return torch.sub(logits[:, 1:], logits[:, :1])


def foreground_probabilities_(log_odds_BFDHW: Tensor, regions: bool) -> Tensor:
    """`class_probabilities` of liver and tumour, in place of their log odds.

    Powers of two are twice as fast as e on a CPU; there, too, shifting is left out where nothing can overflow.
    """
    if regions:
        return log_odds_BFDHW.sigmoid_()
    odds = log_odds_BFDHW
    background: Tensor | float = 1.0
    if odds.device.type != "cpu" or not odds.amax() <= HIGHEST_LOG_ODDS:  # not a number, too
        highest = odds.amax(dim=1, keepdim=True).clamp_(min=0)
        odds.sub_(highest)
        background = highest.mul_(-LOG2_E).exp2_()
    odds.mul_(LOG2_E).exp2_()
    return odds.mul_(odds[:, :1].add(odds[:, 1:]).add_(background).reciprocal_())


def labels_from_logits(probabilities_BCDHW: Tensor, regions: bool) -> Tensor:
    """uint8 labels (B, D, H, W). Regions: tumour where both it and the liver are more likely than not."""
    if not regions:
        # argmax over three channels, 18 times faster on a CPU; of equals the lower class, too
        background, liver, tumour = probabilities_BCDHW.unbind(dim=1)
        label = (liver > background).to(torch.uint8)
        return label.masked_fill_(tumour > torch.maximum(background, liver), TUMOUR)
    liver, tumour = probabilities_BCDHW[:, 0] >= 0.5, probabilities_BCDHW[:, 1] >= 0.5
    label = liver.to(torch.uint8) * LIVER
    return label.masked_fill(liver & tumour, TUMOUR)
