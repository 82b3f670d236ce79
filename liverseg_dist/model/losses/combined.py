"""The configured loss: a sum of terms (`registry.LOSSES`) with deep supervision."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liverseg_dist.config import LossConfig
from liverseg_dist.config.registry import find_registered
from liverseg_dist.errors import UserError
from liverseg_dist.model.losses.class_weights import class_weights
from liverseg_dist.model.losses.partial_labels import (
    ComparedChannels,
    SampleGroup,
    group_samples,
    select_samples,
)
from liverseg_dist.model.losses.registry import LOSSES, DiceTerm, LevelInputs, LossTerm
from liverseg_dist.model.losses.terms import BatchOverlaps, subsample_label
from liverseg_dist.model.outputs import OutputChannels


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
        outputs: meaning of the output channels.
        weights: weights of the classes in the cross-entropy; None: all equal.
        spacing_mm: voxel size (z, y, x), for distances.
    """

    def __init__(
        self,
        config: LossConfig,
        outputs: OutputChannels,
        weights: Sequence[float] | None = None,
        spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        self.config = config
        self.outputs = outputs
        self.spacing_mm = tuple(spacing_mm)
        self.terms = [term(config) for term in find_registered(LOSSES, config.name, "loss.name")]
        weight_tensor = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        # Not persistent: the weights follow from the settings and the store.
        self.register_buffer("class_weights", weight_tensor, persistent=False)
        self.class_weights: Tensor | None

    def forward(
        self,
        outputs: Tensor | Sequence[Tensor],
        label_BDHW: Tensor,
        annotated: Sequence[Sequence[str]] | None = None,
        batch: BatchOverlaps | None = None,
    ) -> LossResult:
        """Compute the loss.

        Args:
            outputs: logits (B, C, D, H, W), or a list of them, full resolution first.
            label_BDHW: uint8; voxels labelled 255 are ignored.
            annotated: names of the annotated structures of each sample's case; the others have no
                influence (`partial_labels`). None: everything is annotated. With
                `loss.batch_dice`, Dice is computed over the samples with equal annotation.
            batch: sums of the batch that these samples are a part of (see `overlap_sums`); None:
                they are the batch.
        """
        levels = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        shares = [0.5**level for level in range(len(levels))]
        groups = group_samples(self.outputs, annotated)
        summands: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        for level, (logits, share) in enumerate(zip(levels, shares, strict=True)):
            terms = [term for term in self.terms if level == 0 or not term.only_full_resolution]
            part_of = None if batch is None else batch.at_level(level)
            values = self._compute_terms(terms, logits, label_BDHW, groups, part_of)
            for term, value in zip(terms, values, strict=True):
                weight = term.weight
                # A term of the full resolution only does not share its weight with other levels.
                if not term.only_full_resolution:
                    weight = weight * share / sum(shares)
                summands.append(weight * value)
                if level == 0:
                    parts[term.part] = value.detach()
        return LossResult(torch.stack(summands).sum(), parts)

    @property
    def couples_samples(self) -> bool:
        """Whether the loss of a batch is not the mean of the losses of its samples."""
        return self.config.batch_dice and any(isinstance(term, DiceTerm) for term in self.terms)

    @torch.no_grad()
    def overlap_sums(
        self,
        outputs: Tensor | Sequence[Tensor],
        label_BDHW: Tensor,
        annotated: Sequence[Sequence[str]] | None = None,
    ) -> Tensor:
        """Return the sums that Dice of a batch is computed from; those of its parts can be added.

        The arguments are those of `forward`.

        Returns:
            float64 (levels, 3, foreground channels), for `BatchOverlaps`.

        Raises:
            UserError: not all structures are annotated in these cases.
        """
        if group_samples(self.outputs, annotated):
            raise UserError(
                "loss.batch_dice over several ranks or micro-batches needs cases in which all "
                "structures are annotated; set loss.batch_dice=false, or use one rank and "
                "train.micro_batch_size of the whole batch"
            )
        dice = next(term for term in self.terms if isinstance(term, DiceTerm))
        sums = []
        for logits in [outputs] if isinstance(outputs, Tensor) else outputs:
            label = subsample_label(label_BDHW, logits.shape[2:])
            sums.append(dice.sum_overlaps(self._prepare_level(logits, label, None)).double())
        return torch.stack(sums)

    def _compute_terms(
        self,
        terms: Sequence[LossTerm],
        logits: Tensor,
        label_BDHW: Tensor,
        groups: Sequence[SampleGroup],
        batch: BatchOverlaps | None = None,
    ) -> list[Tensor]:
        """Return the value of each term for one output of the network, a mean over samples."""
        label_BDHW = subsample_label(label_BDHW, logits.shape[2:])
        if not groups:
            inputs = self._prepare_level(logits, label_BDHW, None)
            inputs.batch = batch
            return [term.compute(inputs) for term in terms]
        # Without any annotation the loss is 0, but still a function of the network's output: all
        # ranks have to run backward.
        nothing = logits.sum() * 0
        values = [nothing] * len(terms)
        for group in groups:
            if group.compared is not None and not group.compared.members:
                continue
            part = select_samples(logits, group.samples)
            part_label = select_samples(label_BDHW, group.samples)
            inputs = self._prepare_level(part, part_label, group.compared)
            fraction = len(group.samples) / logits.shape[0]
            for position, term in enumerate(terms):
                values[position] = values[position] + fraction * term.compute(inputs)
            # Free the label's one-hot copy before the next group.
            del inputs
        return values

    def _prepare_level(
        self, logits: Tensor, label_BDHW: Tensor, compared: ComparedChannels | None
    ) -> LevelInputs:
        # 16-bit logits would lose small differences in the sums over voxels.
        logits = logits if logits.dtype == torch.float64 else logits.float()
        values, weights = self.outputs.channel_values, self.class_weights
        if compared is not None:
            logits = compared.select_logits(logits)
            label_BDHW = compared.renumber_label(label_BDHW)
            values, weights = compared.channel_values, compared.select_weights(weights)
        return LevelInputs(
            logits, label_BDHW, self.outputs.regions, values, weights, self.spacing_mm
        )


def build_loss(
    config: LossConfig,
    outputs: OutputChannels,
    class_voxels: Sequence[int] | None = None,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
) -> SegmentationLoss:
    """Build the configured loss.

    Args:
        config: settings `loss.*`.
        outputs: meaning of the network's output channels.
        class_voxels: voxels of each class in the store, background first, for the weights `auto`.
        spacing_mm: voxel size (z, y, x), so that a boundary term measures alike along all axes.

    Raises:
        UserError: unknown loss, or class weights that cannot be used.
    """
    weights = class_weights(config, class_voxels, outputs.labels)
    return SegmentationLoss(config, outputs, weights, spacing_mm)
