"""Losses against class imbalance. All are computed in float32 and leave out voxels labelled 255 (padding).

Each is a mean over samples, so the mean over micro-batches of equal size is the value of the whole batch; only
`batch_dice` couples the samples of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liverseg_dist.config import LossConfig, ModelConfig
from liverseg_dist.errors import UserError
from liverseg_dist.labels import IGNORE, LIVER, NUM_CLASSES, TUMOUR

SMOOTH = 1e-5
"""Added above and below the Dice and Tversky ratios: a class absent from truth and prediction scores 1, not NaN."""


@dataclass(frozen=True)
class LossResult:
    """`total` is what is minimised; `parts` are its unweighted summands at full resolution, detached."""

    total: Tensor
    parts: dict[str, Tensor]


class SegmentationLoss(nn.Module):
    """Overlap part (Dice or Tversky) plus cross-entropy part (plain, weighted or focal), with deep supervision.

    Level i of the outputs weighs 1/2^i, normalised to a sum of 1; labels are subsampled to each output's size.
    """

    def __init__(self, config: LossConfig, regions: bool, class_weights: Sequence[float] | None) -> None:
        super().__init__()
        self.config = config
        self.regions = regions
        overlap, _, cross = config.name.partition("_")
        self.overlap = overlap if overlap in ("dice", "tversky") else ""
        self.cross = cross or ("ce" if overlap == "ce" else "")
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        self.class_weights: Tensor | None

    def forward(self, outputs: Tensor | Sequence[Tensor], label_BDHW: Tensor) -> LossResult:
        levels = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        shares = [0.5**level for level in range(len(levels))]
        total = levels[0].new_zeros((), dtype=torch.float32)
        parts: dict[str, Tensor] = {}
        for level, (logits, share) in enumerate(zip(levels, shares, strict=True)):
            ours = self._one(logits.float(), subsample(label_BDHW, logits.shape[2:]))
            value = self.config.dice_weight * ours.get("dice", 0.0) + self.config.ce_weight * ours.get("ce", 0.0)
            total = total + share / sum(shares) * value
            if level == 0:
                parts = {name: part.detach() for name, part in ours.items()}
        return LossResult(total, parts)

    def _one(self, logits: Tensor, label_BDHW: Tensor) -> dict[str, Tensor]:
        valid = (label_BDHW != IGNORE).unsqueeze(1).float()
        target = one_hot(label_BDHW, self.regions)
        found: dict[str, Tensor] = {}
        if self.overlap:
            probability = torch.sigmoid(logits) if self.regions else torch.softmax(logits, dim=1)[:, 1:]
            wanted = target if self.regions else target[:, 1:]
            alpha, beta = 0.5, 0.5
            if self.overlap == "tversky":
                alpha, beta = self.config.tversky_alpha, 1 - self.config.tversky_alpha
            found["dice"] = 1 - tversky_index(probability * valid, wanted * valid, alpha, beta, self.config.batch_dice)
        if self.cross:
            gamma = self.config.focal_gamma if self.cross == "focal" else 0.0
            entropy = (
                region_entropy(logits, target, gamma) if self.regions else class_entropy(logits, label_BDHW, gamma)
            )
            found["ce"] = self._weighted_mean(entropy, label_BDHW)
        return found

    def _weighted_mean(self, entropy_BDHW: Tensor, label_BDHW: Tensor) -> Tensor:
        """Per sample: sum of weight * entropy over valid voxels, divided by the sum of weights; then over samples."""
        weight = (label_BDHW != IGNORE).float()
        if self.class_weights is not None:
            weight = weight * self.class_weights[label_BDHW.long().clamp(max=NUM_CLASSES - 1)]
        sums = (entropy_BDHW * weight).flatten(1).sum(1)
        return (sums / weight.flatten(1).sum(1).clamp_min(1e-8)).mean()


def tversky_index(probability: Tensor, target: Tensor, alpha: float, beta: float, batch: bool) -> Tensor:
    """Mean over channels (and samples unless `batch`) of TP / (TP + alpha FP + beta FN); 0.5, 0.5 is soft Dice.

    https://arxiv.org/abs/1706.05721; https://arxiv.org/abs/1606.04797. Inputs (B, C, D, H, W), already masked.
    """
    axes = (0, 2, 3, 4) if batch else (2, 3, 4)
    true = (probability * target).sum(axes)
    false_positive = probability.sum(axes) - true
    false_negative = target.sum(axes) - true
    return ((true + SMOOTH) / (true + alpha * false_positive + beta * false_negative + SMOOTH)).mean()


def class_entropy(logits: Tensor, label_BDHW: Tensor, gamma: float) -> Tensor:
    """Softmax (focal) cross-entropy per voxel, (B, D, H, W); 0 on padding. gamma 0: plain.

    Focal: https://arxiv.org/abs/1708.02002.
    """
    entropy = F.cross_entropy(logits, label_BDHW.long(), ignore_index=IGNORE, reduction="none")
    return entropy if gamma == 0 else (1 - torch.exp(-entropy)) ** gamma * entropy


def region_entropy(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Sigmoid (focal) cross-entropy per voxel, mean over regions, (B, D, H, W)."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if gamma:
        entropy = (1 - torch.exp(-entropy)) ** gamma * entropy
    return entropy.mean(dim=1)


def one_hot(label_BDHW: Tensor, regions: bool) -> Tensor:
    """float32 (B, C, D, H, W): the three classes, or the regions liver (1 or 2) and tumour; padding is all zeros."""
    if regions:
        tumour = label_BDHW == TUMOUR
        return torch.stack([(label_BDHW == LIVER) | tumour, tumour], dim=1).float()
    return torch.stack([label_BDHW == value for value in range(NUM_CLASSES)], dim=1).float()


def subsample(label_BDHW: Tensor, size: Sequence[int]) -> Tensor:
    """Labels at a lower output's resolution: nearest neighbour, as nnU-Net does."""
    if tuple(label_BDHW.shape[1:]) == tuple(size):
        return label_BDHW
    return F.interpolate(label_BDHW.unsqueeze(1).float(), size=tuple(size), mode="nearest").squeeze(1).to(torch.uint8)


def frequency_weights(class_voxels: Sequence[int]) -> tuple[float, ...]:
    """`auto`: inverse square root of each class's frequency, normalised to a mean of 1.

    Plain inverse frequencies span three orders of magnitude on LiTS (tumour about 0.2 % of a slab) and flood the
    background with false positives; the square root keeps the ratio near 20.
    """
    total = sum(class_voxels)
    raw = [(total / max(count, 1)) ** 0.5 for count in class_voxels]
    return tuple(value * len(raw) / sum(raw) for value in raw)


def build_loss(config: LossConfig, model: ModelConfig, class_voxels: Sequence[int] | None = None) -> SegmentationLoss:
    """The configured loss. `class_voxels` (background, liver, tumour) is needed for weights `auto`."""
    weights: tuple[float, ...] | None
    if config.class_weights == "none":
        weights = None
    elif config.class_weights == "auto":
        if class_voxels is None:
            raise UserError("loss.class_weights=auto needs the store's class counts; give three numbers instead")
        weights = frequency_weights(class_voxels)
    else:
        weights = tuple(float(w) for w in config.class_weights)
        if len(weights) != NUM_CLASSES:
            raise UserError(
                f"loss.class_weights has {len(weights)} numbers; background, liver and tumour need one each"
            )
    return SegmentationLoss(config, model.regions, weights)
