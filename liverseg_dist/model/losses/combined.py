"""The configured loss: an overlap term, a cross-entropy term and a boundary term, with deep supervision."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liverseg_dist.config import LossConfig, ModelConfig
from liverseg_dist.labels import IGNORE, NUM_CLASSES
from liverseg_dist.model.losses.boundary import boundary_term
from liverseg_dist.model.losses.class_weights import class_weights
from liverseg_dist.model.losses.terms import (
    class_entropy,
    one_hot,
    region_entropy,
    subsample_label,
    tversky_index,
)


@dataclass(frozen=True)
class LossResult:
    """`total` is what is minimised; `parts` are its unweighted summands at full resolution, detached.

    Parts: `dice` (or Tversky), `ce` (or focal), `boundary`, as far as the loss has them.
    """

    total: Tensor
    parts: dict[str, Tensor]


class SegmentationLoss(nn.Module):
    """Overlap part (Dice or Tversky) plus cross-entropy part (plain, weighted or focal), with deep supervision.

    Level i of the outputs weighs 1/2^i, normalised to a sum of 1; labels are subsampled to each output's size. (nnU-Net
    weighs its lowest output 0; our network does not have it.) The boundary part is for the full resolution only.
    """

    def __init__(
        self,
        config: LossConfig,
        regions: bool,
        weights: Sequence[float] | None = None,
        spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        self.config = config
        self.regions = regions
        self.spacing_mm = tuple(spacing_mm)
        named = config.name.split("_")
        self.overlap = next((term for term in named if term in ("dice", "tversky")), "")
        self.cross = next((term for term in named if term in ("ce", "focal")), "")
        self.boundary = "boundary" in named
        found = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        self.register_buffer("class_weights", found, persistent=False)
        self.class_weights: Tensor | None

    def forward(self, outputs: Tensor | Sequence[Tensor], label_BDHW: Tensor) -> LossResult:
        """`outputs`: logits (B, C, D, H, W), or a list of them, full resolution first; labels uint8, 255 left out."""
        levels = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        shares = [0.5**level for level in range(len(levels))]
        scale = {"dice": self.config.dice_weight, "ce": self.config.ce_weight}
        summands: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        for level, (logits, share) in enumerate(zip(levels, shares, strict=True)):
            ours = self._one(
                _at_least_float32(logits),
                subsample_label(label_BDHW, logits.shape[2:]),
                whole=level == 0,
            )
            for name, part in ours.items():
                weight = (
                    scale[name] * share / sum(shares)
                    if name in scale
                    else self.config.boundary_weight
                )
                summands.append(weight * part)
            if level == 0:
                parts = {name: part.detach() for name, part in ours.items()}
        return LossResult(torch.stack(summands).sum(), parts)

    def _one(self, logits: Tensor, label_BDHW: Tensor, whole: bool) -> dict[str, Tensor]:
        known = label_BDHW != IGNORE
        valid = known.unsqueeze(1).to(logits.dtype)
        logged = None if self.regions else torch.log_softmax(logits, dim=1)
        target = one_hot(label_BDHW, self.regions, logits.dtype)
        found: dict[str, Tensor] = {}
        if self.overlap or self.boundary:
            probability = torch.sigmoid(logits) if logged is None else logged[:, 1:].exp()
            wanted = target if self.regions else target[:, 1:]
            if self.overlap:
                alpha = self.config.tversky_alpha if self.overlap == "tversky" else 0.5
                index = tversky_index(
                    probability * valid, wanted, alpha, 1 - alpha, self.config.batch_dice
                )
                found["dice"] = 1 - index
            if self.boundary and whole:
                found["boundary"] = boundary_term(
                    probability, wanted, valid, self.config.boundary_reach_voxels, self.spacing_mm
                )
        if self.cross:
            gamma = self.config.focal_gamma if self.cross == "focal" else 0.0
            entropy = (
                region_entropy(logits, target, gamma)
                if logged is None
                else class_entropy(logged, label_BDHW, gamma)
            )
            found["ce"] = self._weighted_mean(entropy, label_BDHW, known)
        return found

    def _weighted_mean(
        self, entropy_BDHW: Tensor, label_BDHW: Tensor, known_BDHW: Tensor
    ) -> Tensor:
        """Per sample: sum of weight * entropy over valid voxels, divided by the sum of weights; then over samples."""
        weight = known_BDHW.to(entropy_BDHW.dtype)
        if self.class_weights is not None:
            weight = weight * self.class_weights[label_BDHW.long().clamp(max=NUM_CLASSES - 1)]
        sums = (entropy_BDHW * weight).flatten(1).sum(1)
        return (sums / weight.flatten(1).sum(1).clamp_min(1e-8)).mean()


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def build_loss(
    config: LossConfig,
    model: ModelConfig,
    class_voxels: Sequence[int] | None = None,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
) -> SegmentationLoss:
    """The configured loss. `class_voxels` (background, liver, tumour) is needed for weights `auto`; `spacing_mm`
    (z, y, x) lets a boundary part measure alike along all axes. Raises `UserError`."""
    return SegmentationLoss(config, model.regions, class_weights(config, class_voxels), spacing_mm)
