"""The losses that `loss.name` can name, and the terms that they consist of.

A new loss is a list of terms in `LOSSES` and its name in the setting (`config.model.LossConfig`). A
new term is a subclass of `LossTerm`.

Used by `combined.SegmentationLoss`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from liverseg_dist.config import LossConfig
from liverseg_dist.labels import IGNORE
from liverseg_dist.model.losses.boundary import boundary_term
from liverseg_dist.model.losses.terms import (
    BatchOverlaps,
    class_entropy,
    one_hot,
    overlap_sums,
    region_entropy,
    tversky_index,
)


@dataclass(eq=False)
class LevelInputs:
    """One output of the network and its label; quantities that several terms need once.

    Shapes: logits (B, C, D, H, W), label (B, D, H, W).
    """

    logits: Tensor
    """float32 or float64."""
    label_BDHW: Tensor
    """uint8; IGNORE is padding."""
    regions: bool
    """Whether channels are overlapping regions (sigmoid) instead of classes (softmax)."""
    channel_values: Sequence[Sequence[int]]
    """The class values that each channel stands for (`OutputChannels.channel_values`)."""
    class_weights: Tensor | None
    """Weight of each class value in the cross-entropy; None: all equal."""
    spacing_mm: Sequence[float]
    """Voxel size (z, y, x)."""
    batch: BatchOverlaps | None = None
    """Sums of the whole batch, of which these samples are a part; None: they are the batch."""

    @cached_property
    def known_BDHW(self) -> Tensor:
        """True where the voxel has a label."""
        return self.label_BDHW != IGNORE

    @cached_property
    def valid_B1DHW(self) -> Tensor:
        """1 where the voxel has a label, else 0."""
        return self.known_BDHW.unsqueeze(1).to(self.logits.dtype)

    @cached_property
    def log_probability(self) -> Tensor:
        """Logarithm of the softmax; for classes only."""
        return torch.log_softmax(self.logits, dim=1)

    @cached_property
    def target(self) -> Tensor:
        """One-hot label of all channels."""
        return one_hot(self.label_BDHW, self.channel_values, self.logits.dtype)

    @cached_property
    def foreground_probability(self) -> Tensor:
        """Probabilities without the background."""
        if self.regions:
            return torch.sigmoid(self.logits)
        return self.log_probability[:, 1:].exp()

    @property
    def foreground_target(self) -> Tensor:
        """One-hot label without the background."""
        return self.target if self.regions else self.target[:, 1:]


class LossTerm(ABC):
    """One summand of a loss, computed for one output of the network."""

    part: str
    """Name under which the term is logged."""
    only_full_resolution = False
    """Whether the term is left out for the lower outputs of deep supervision."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config

    @property
    @abstractmethod
    def weight(self) -> float:
        """Factor of the term in the sum."""

    @abstractmethod
    def compute(self, inputs: LevelInputs) -> Tensor:
        """Return the term's value, a mean over samples (scalar)."""


class DiceTerm(LossTerm):
    """1 - soft Dice of the foreground channels."""

    part = "dice"
    alpha = 0.5
    """Weight of false positives; false negatives have 1 - alpha."""

    @property
    def weight(self) -> float:
        return self.config.dice_weight

    def sum_overlaps(self, inputs: LevelInputs) -> Tensor:
        """Return the sums that the index is computed from."""
        return overlap_sums(
            inputs.foreground_probability * inputs.valid_B1DHW,
            inputs.foreground_target,
            self.config.batch_dice,
        )

    def compute(self, inputs: LevelInputs) -> Tensor:
        sums = self.sum_overlaps(inputs)
        if inputs.batch is not None:
            sums = inputs.batch.with_gradient_of(sums)
        return 1 - tversky_index(sums, self.alpha, 1 - self.alpha)


class TverskyTerm(DiceTerm):
    """1 - Tversky index of the foreground channels; logged under `dice`, which it replaces."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__(config)
        self.alpha = config.tversky_alpha


class BoundaryTerm(LossTerm):
    """Distance of wrong voxels to the true surface."""

    part = "boundary"
    # The distance would have to be computed again for each resolution, for little gain.
    only_full_resolution = True

    @property
    def weight(self) -> float:
        return self.config.boundary_weight

    def compute(self, inputs: LevelInputs) -> Tensor:
        return boundary_term(
            inputs.foreground_probability,
            inputs.foreground_target,
            inputs.valid_B1DHW,
            self.config.boundary_reach_voxels,
            inputs.spacing_mm,
        )


class CrossEntropyTerm(LossTerm):
    """Weighted cross-entropy of classes or regions."""

    part = "ce"
    # A class attribute, so that the focal term only replaces its value.
    gamma = 0.0
    """Exponent of the focal factor; 0: plain cross-entropy."""

    @property
    def weight(self) -> float:
        return self.config.ce_weight

    def compute(self, inputs: LevelInputs) -> Tensor:
        if inputs.regions:
            entropy = region_entropy(inputs.logits, inputs.target, self.gamma)
        else:
            entropy = class_entropy(inputs.log_probability, inputs.label_BDHW, self.gamma)
        return _weighted_mean(entropy, inputs)


class FocalTerm(CrossEntropyTerm):
    """Focal loss; logged under `ce`, which it replaces."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__(config)
        self.gamma = config.focal_gamma


def _weighted_mean(entropy_BDHW: Tensor, inputs: LevelInputs) -> Tensor:
    """Return the weighted mean over the known voxels of each sample, then over samples."""
    weight = inputs.known_BDHW.to(entropy_BDHW.dtype)
    if inputs.class_weights is not None:
        # Padding has no class of its own; its weight is 0 already.
        label = inputs.label_BDHW.long().clamp(max=len(inputs.class_weights) - 1)
        weight = weight * inputs.class_weights[label]
    sums = (entropy_BDHW * weight).flatten(1).sum(1)
    return (sums / weight.flatten(1).sum(1).clamp_min(1e-8)).mean()


LOSSES: dict[str, tuple[type[LossTerm], ...]] = {
    "dice_ce": (DiceTerm, CrossEntropyTerm),
    "dice_focal": (DiceTerm, FocalTerm),
    "tversky_ce": (TverskyTerm, CrossEntropyTerm),
    "tversky_focal": (TverskyTerm, FocalTerm),
    "dice_ce_boundary": (DiceTerm, BoundaryTerm, CrossEntropyTerm),
    "dice_focal_boundary": (DiceTerm, BoundaryTerm, FocalTerm),
    "dice": (DiceTerm,),
    "tversky": (TverskyTerm,),
    "ce": (CrossEntropyTerm,),
    "focal": (FocalTerm,),
}
"""Terms by `loss.name`, in the order in which they are summed."""
