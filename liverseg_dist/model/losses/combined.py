"""The configured loss: a sum of terms (`registry.LOSSES`) with deep supervision."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liverseg_dist.config import LossConfig, ModelConfig
from liverseg_dist.config.registry import find_registered
from liverseg_dist.model.losses.class_weights import class_weights
from liverseg_dist.model.losses.registry import LOSSES, LevelInputs
from liverseg_dist.model.losses.terms import subsample_label


@dataclass(frozen=True)
class LossResult:
    """Value of the loss."""

    total: Tensor
    """The scalar that is minimised."""
    parts: dict[str, Tensor]
    """Unweighted terms at full resolution, detached: `dice` (or Tversky), `ce` (or focal) and
    `boundary`, if the loss has them."""


class SegmentationLoss(nn.Module):
    """Weighted sum of terms, with deep supervision.

    Output i has the weight 1/2^i, normalised to a sum of 1; labels are subsampled to each output's
    size. (nnU-Net gives its lowest output the weight 0; this network does not have that output.)

    Args:
        config: name and weights of the terms.
        regions: whether channels are overlapping regions instead of classes.
        weights: weights of the classes in the cross-entropy; None: all equal.
        spacing_mm: voxel size (z, y, x), for distances.
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
        self.terms = [term(config) for term in find_registered(LOSSES, config.name, "loss.name")]
        weight_tensor = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        # Not persistent: the weights follow from the settings and the store.
        self.register_buffer("class_weights", weight_tensor, persistent=False)
        self.class_weights: Tensor | None

    def forward(self, outputs: Tensor | Sequence[Tensor], label_BDHW: Tensor) -> LossResult:
        """Compute the loss.

        Args:
            outputs: logits (B, C, D, H, W), or a list of them, full resolution first.
            label_BDHW: uint8; voxels labelled 255 are ignored.
        """
        levels = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        shares = [0.5**level for level in range(len(levels))]
        summands: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        for level, (logits, share) in enumerate(zip(levels, shares, strict=True)):
            inputs = self._prepare_level(logits, label_BDHW)
            for term in self.terms:
                if term.only_full_resolution and level > 0:
                    continue
                value = term.compute(inputs)
                weight = term.weight
                # A term of the full resolution only does not share its weight with other levels.
                if not term.only_full_resolution:
                    weight = weight * share / sum(shares)
                summands.append(weight * value)
                if level == 0:
                    parts[term.part] = value.detach()
            # Free the label's one-hot copy before the next level.
            del inputs
        return LossResult(torch.stack(summands).sum(), parts)

    def _prepare_level(self, logits: Tensor, label_BDHW: Tensor) -> LevelInputs:
        # 16-bit logits would lose small differences in the sums over voxels.
        return LevelInputs(
            logits if logits.dtype == torch.float64 else logits.float(),
            subsample_label(label_BDHW, logits.shape[2:]),
            self.regions,
            self.class_weights,
            self.spacing_mm,
        )


def build_loss(
    config: LossConfig,
    model: ModelConfig,
    class_voxels: Sequence[int] | None = None,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
) -> SegmentationLoss:
    """Build the configured loss.

    Args:
        config: settings `loss.*`.
        model: settings `model.*`.
        class_voxels: voxels of background, liver and tumour in the store, for the weights `auto`.
        spacing_mm: voxel size (z, y, x), so that a boundary term measures alike along all axes.

    Raises:
        UserError: unknown loss, or class weights that cannot be used.
    """
    weights = class_weights(config, class_voxels)
    return SegmentationLoss(config, model.regions, weights, spacing_mm)
