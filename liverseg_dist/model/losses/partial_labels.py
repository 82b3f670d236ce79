"""What a loss compares in cases of which only some structures were annotated.

Classes (softmax): the annotation does not distinguish some classes. For example, the
background of a case without annotated spleen may be spleen. The probabilities of such classes are
summed, and the loss compares the sums (marginal loss: Fang & Yan 2020,
https://arxiv.org/abs/2001.00208; Shi et al. 2021, https://arxiv.org/abs/2007.03868). The sum of
probabilities is the softmax of the log-sum-exp of the logits, so every term of a loss is computed
from the summed channels as from ordinary ones.

Regions (sigmoid): a channel whose structure was not annotated is left out. Its gradient is 0.

Used by `combined.SegmentationLoss`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from liverseg_dist.model.outputs import OutputChannels


@dataclass(frozen=True)
class ComparedChannels:
    """How the channels of the logits and the class values of labels become those of a loss."""

    members: tuple[tuple[int, ...], ...]
    """The channels of the logits that each compared channel sums."""
    channel_values: tuple[tuple[int, ...], ...]
    """The values of the renumbered label that each compared channel stands for."""
    new_values: tuple[int, ...] | None
    """The value of each class value in the renumbered label; None: the label stays as it is."""
    weight_of: tuple[int, ...]
    """For each value of the renumbered label, the class value whose weight it has. Classes that
    are not distinguished have the weight of the lowest one."""

    def select_logits(self, logits: Tensor) -> Tensor:
        """Return the logits (B, channels, D, H, W) of the compared channels."""
        # Views and not lists of indices: on a GPU a list would have to be copied to the device.
        channels = logits.unbind(dim=1)
        selected = []
        for members in self.members:
            if len(members) == 1:
                selected.append(channels[members[0]])
            else:
                together = torch.stack([channels[member] for member in members])
                selected.append(torch.logsumexp(together, dim=0))
        return torch.stack(selected, dim=1)

    def renumber_label(self, label_BDHW: Tensor) -> Tensor:
        """Return the label with the values of the compared channels; padding is kept."""
        if self.new_values is None:
            return label_BDHW
        renumbered = label_BDHW.clone()
        for old, new in enumerate(self.new_values):
            if old != new:
                renumbered.masked_fill_(label_BDHW == old, new)
        return renumbered

    def select_weights(self, weights: Tensor | None) -> Tensor | None:
        """Return the weight of each value of the renumbered label."""
        if weights is None:
            return None
        return torch.stack([weights[value] for value in self.weight_of])


@dataclass(frozen=True)
class SampleGroup:
    """Samples of a batch whose cases have the same annotated structures."""

    samples: tuple[int, ...]
    """Positions in the batch."""
    compared: ComparedChannels | None
    """None: everything is annotated."""


@lru_cache(maxsize=4096)
def find_compared_channels(
    outputs: OutputChannels, annotated: tuple[str, ...]
) -> ComparedChannels | None:
    """Return what a loss compares in a case; None: everything is annotated.

    Args:
        outputs: meaning of the output channels.
        annotated: names of the annotated structures.
    """
    labels = outputs.labels
    if set(labels.structure_names) <= set(annotated):
        return None
    lowest = labels.indistinguishable_classes(annotated)
    if outputs.regions:
        rows = []
        for row, structure in enumerate(labels.structures):
            if structure.name in annotated:
                rows.append(row)
        members = tuple((row,) for row in rows)
        channel_values = tuple(labels.structures[row].values for row in rows)
        return ComparedChannels(members, channel_values, None, lowest)
    kept = sorted(set(lowest))
    # The background alone: there is nothing to compare.
    if len(kept) == 1:
        return ComparedChannels((), (), None, lowest)
    groups = []
    for value in kept:
        groups.append(tuple(other for other, low in enumerate(lowest) if low == value))
    return ComparedChannels(
        tuple(groups),
        tuple((number,) for number in range(len(kept))),
        tuple(kept.index(value) for value in lowest),
        tuple(kept),
    )


def group_samples(
    outputs: OutputChannels, annotated: Sequence[Sequence[str]] | None
) -> list[SampleGroup]:
    """Group the samples of a batch by what their cases have annotated, in the order of the batch.

    Args:
        outputs: meaning of the output channels.
        annotated: names of the annotated structures of each sample; None: everything.

    Returns:
        An empty list where every sample is annotated completely.
    """
    if annotated is None:
        return []
    found: dict[ComparedChannels | None, list[int]] = {}
    for sample, names in enumerate(annotated):
        compared = find_compared_channels(outputs, tuple(names))
        found.setdefault(compared, []).append(sample)
    if set(found) == {None}:
        return []
    return [SampleGroup(tuple(samples), compared) for compared, samples in found.items()]


def select_samples(batch: Tensor, samples: Sequence[int]) -> Tensor:
    """Return some samples of a batch, in the given order; all of them without a copy."""
    if len(samples) == batch.shape[0]:
        return batch
    return torch.stack([batch[sample] for sample in samples])
