"""Class values from the probabilities of the foreground channels, for any label scheme.

Without thresholds a voxel gets the most likely class, or its regions are painted. With
`inference.lesion_threshold` a voxel inside an organ is lesion from a probability on. Used by
`sliding_window`; `label_codes` stores its intermediate results, to try thresholds without the
network.

Dimensions: F foreground channels (classes without background, or regions), D H W = z, y, x.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liverseg_dist.inference.structure_values import list_tissue_values
from liverseg_dist.labels import Structure
from liverseg_dist.model.outputs import OutputChannels, labels_from_logits, paint_regions

ORGAN_PROBABILITY = 0.5
"""With a threshold, a voxel is inside an organ from this probability on."""


@dataclass(frozen=True)
class ThresholdedOrgan:
    """An organ and the lesions in it that can have a threshold.

    Attributes:
        organ: the organ; None for lesions outside of any structure.
        lesions: in the order in which they are painted, the last one on top.
    """

    organ: Structure | None
    lesions: tuple[Structure, ...]


def add_background(foreground_FDHW: Tensor, outputs: OutputChannels) -> Tensor:
    """All channels of the model: classes with their background; regions unchanged."""
    if outputs.regions:
        return foreground_FDHW
    if len(foreground_FDHW) == 2:
        # Two classes are Task03's case, whose results must not change by a bit.
        # The order of the sum decides about its last bits; it is that of `foreground_probabilities_`.
        first, second = foreground_FDHW
        return torch.stack([1 - (first + second), first, second])
    background = 1 - foreground_FDHW.sum(dim=0, keepdim=True)
    return torch.cat([background, foreground_FDHW])


def sum_structure_probability(
    foreground_FDHW: Tensor, structure: Structure, outputs: OutputChannels
) -> Tensor:
    """Probability D H W of a structure.

    Classes exclude each other, so those of the structure are added; a region is a channel.
    """
    channels = outputs.foreground_channels(structure)
    total = foreground_FDHW[channels[0]]
    for channel in channels[1:]:
        total = total + foreground_FDHW[channel]
    return total


def assign_labels(
    foreground_FDHW: Tensor, outputs: OutputChannels, thresholds: Mapping[str, float]
) -> Tensor:
    """Class values (D, H, W) uint8.

    Args:
        foreground_FDHW: probabilities.
        outputs: what the channels mean.
        thresholds: lowest probability of lesion structures; those without an entry have none.
    """
    label = assign_most_likely(foreground_FDHW, outputs)
    # An organ's groups are independent of each other: their values do not overlap.
    for group in list_thresholded_organs(outputs, thresholds):
        rest = assign_without_lesions(foreground_FDHW, outputs, group)
        reached = []
        for lesion in group.lesions:
            probability = sum_structure_probability(foreground_FDHW, lesion, outputs)
            reached.append(probability >= thresholds[lesion.name])
        label = apply_thresholds(label, rest, reached, outputs, group)
    return label


def assign_most_likely(foreground_FDHW: Tensor, outputs: OutputChannels) -> Tensor:
    """Class values (D, H, W) without thresholds."""
    return labels_from_logits(add_background(foreground_FDHW, outputs)[None], outputs)[0]


def list_thresholded_organs(
    outputs: OutputChannels, names: Mapping[str, float] | Sequence[str]
) -> list[ThresholdedOrgan]:
    """The organs with the named lesions, containers before what they contain."""
    labels = outputs.labels
    groups: dict[str | None, list[Structure]] = {}
    # Containers first: a lesion inside a lesion is painted over it.
    by_size = sorted(labels.lesions, key=lambda lesion: -len(lesion.values))
    for lesion in by_size:
        if lesion.name in names:
            groups.setdefault(lesion.inside, []).append(lesion)
    found = []
    for name, lesions in groups.items():
        organ = None if name is None else labels.structure(name)
        found.append(ThresholdedOrgan(organ, tuple(lesions)))
    return found


def assign_without_lesions(
    foreground_FDHW: Tensor, outputs: OutputChannels, group: ThresholdedOrgan
) -> Tensor:
    """Class values (D, H, W) as if the lesions of an organ did not exist.

    Inside the organ it is its most likely tissue, outside the most likely class that is not of the
    organ. So the value shows where the organ is.
    """
    labels = outputs.labels
    if group.organ is None:
        lesion_values: set[int] = set()
        for lesion in labels.lesions:
            if lesion.inside is None:
                lesion_values |= set(lesion.values)
        others = [value for value in range(labels.num_classes) if value not in lesion_values]
        return _find_most_likely(foreground_FDHW, outputs, others)
    # The probabilities of the lesions are part of their organ's, so a large lesion does not make a
    # hole in it.
    inside = sum_structure_probability(foreground_FDHW, group.organ, outputs) >= ORGAN_PROBABILITY
    tissue = list_tissue_values(labels, group.organ) or group.organ.values
    others = [value for value in range(labels.num_classes) if value not in group.organ.values]
    # The best class of each side is computed for all voxels: two passes are cheaper than a gather
    # by voxel.
    outer = _find_most_likely(foreground_FDHW, outputs, others)
    inner = _find_most_likely(foreground_FDHW, outputs, tissue)
    return torch.where(inside, inner, outer)


def apply_thresholds(
    label_DHW: Tensor,
    rest_DHW: Tensor,
    reached: Sequence[Tensor],
    outputs: OutputChannels,
    group: ThresholdedOrgan,
) -> Tensor:
    """Class values (D, H, W) with the thresholds of one organ.

    Args:
        label_DHW: class values so far.
        rest_DHW: result of `assign_without_lesions`.
        reached: for each lesion of the group, where it reaches its threshold.
        outputs: what the channels mean.
        group: the organ.
    """
    labels = outputs.labels
    thresholded: set[int] = set()
    for lesion in group.lesions:
        thresholded |= set(lesion.values)
    if group.organ is None:
        inside = torch.ones_like(label_DHW, dtype=torch.bool)
        replaced = _is_any(label_DHW, thresholded)
    else:
        inside = _is_any(rest_DHW, group.organ.values)
        # Lesions without a threshold stay where they are the most likely class.
        other_lesions = set(group.organ.values) - set(list_tissue_values(labels, group.organ))
        is_kept = inside & _is_any(label_DHW, other_lesions - thresholded)
        replaced = (inside | _is_any(label_DHW, group.organ.values)) & ~is_kept
    label = torch.where(replaced, rest_DHW, label_DHW)
    for lesion, is_reached in zip(group.lesions, reached, strict=True):
        # A threshold gives the place of the lesion, not which of its parts; the most likely class
        # decides that.
        # A lesion in the lesion keeps its value where it is the most likely class.
        own_value = find_painted_value(lesion, outputs)
        is_lesion = inside & is_reached
        is_kept = _is_any(label_DHW, set(lesion.values) - {own_value})
        label = torch.where(is_lesion & ~is_kept, own_value, label)
        label = torch.where(is_lesion & is_kept, label_DHW, label)
    return label


def find_painted_value(lesion: Structure, outputs: OutputChannels) -> int:
    """The value that a lesion is painted with."""
    index = outputs.labels.structures.index(lesion)
    return dict(outputs.labels.paint_order).get(index, lesion.values[0])


def _find_most_likely(
    foreground_FDHW: Tensor, outputs: OutputChannels, values: Sequence[int]
) -> Tensor:
    """The most likely of some class values; of equals the first."""
    if len(values) == 1:
        return torch.full_like(foreground_FDHW[0], values[0], dtype=torch.uint8)
    if outputs.regions:
        labels = outputs.labels
        inside_SDHW = foreground_FDHW >= ORGAN_PROBABILITY
        for index, structure in enumerate(labels.structures):
            # A region that has none of the values does not exist here.
            if not set(structure.values) & set(values):
                inside_SDHW[index] = False
        painted = paint_regions(inside_SDHW[None], labels)[0]
        return torch.where(_is_any(painted, values), painted, values[0])
    all_channels = add_background(foreground_FDHW, outputs)
    best, best_probability = None, None
    for value in values:
        probability = all_channels[value]
        if best is None or best_probability is None:
            # One class after the other: `argmax` over a selection would copy all channels.
            best = torch.full_like(probability, value, dtype=torch.uint8)
            best_probability = probability
            continue
        # Strictly greater: of equals the first class stays, as in `argmax`.
        best = best.masked_fill(probability > best_probability, value)
        best_probability = torch.maximum(best_probability, probability)
    assert best is not None
    return best


def _is_any(label_DHW: Tensor, values: Sequence[int] | set[int]) -> Tensor:
    selected = torch.zeros_like(label_DHW, dtype=torch.bool)
    for value in values:
        selected |= label_DHW == value
    return selected
