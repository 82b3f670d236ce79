"""Transforms that depend on the label: contrast phase and copies of lesions.

Both work on the lesions of the label scheme and on the structures that contain them. Both take
numbers from the random stream after all other transforms (`Transform.draw_late`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from liverseg_dist.data.augment.transform import (
    Range,
    Sample,
    SampleContext,
    Transform,
    draw_value,
)
from liverseg_dist.data.counter_random import CounterRandom
from liverseg_dist.labels import LITS_SCHEME, LabelScheme, Structure
from liverseg_dist.volume import Index3

Tensor = torch.Tensor
Values = tuple[int, ...]
"""Class values."""


def enhancing_values(labels: LabelScheme) -> tuple[Values, ...]:
    """Return the class values of each tissue that takes up contrast medium by itself.

    These are the structures that contain lesions, then the lesions, each without the values of
    those within it.
    """
    containers: list[Structure] = []
    for lesion in labels.lesions:
        container = None if lesion.inside is None else labels.structure(lesion.inside)
        if container is not None and container.kind == "organ" and container not in containers:
            containers.append(container)
    tissues = [*containers, *labels.lesions]
    result = []
    for tissue in tissues:
        own = set(tissue.values)
        for other in tissues:
            if set(other.values) < set(tissue.values):
                own -= set(other.values)
        if own:
            result.append(tuple(sorted(own)))
    return tuple(result)


def copyable_values(labels: LabelScheme) -> tuple[tuple[Values, Values], ...]:
    """Return (values of a lesion, values on which a copy of it may be pasted) pairs.

    Lesions are those that lie directly inside an organ, with everything inside them. A copy is
    pasted on what remains of the organ without its lesions.
    """
    lesion_values = {value for lesion in labels.lesions for value in lesion.values}
    pairs = []
    for lesion in labels.lesions:
        container = None if lesion.inside is None else labels.structure(lesion.inside)
        if container is None or container.kind != "organ":
            continue
        free = tuple(sorted(set(container.values) - lesion_values))
        if free:
            pairs.append((lesion.values, free))
    return tuple(pairs)


@dataclass(frozen=True)
class EnhancementTransform(Transform):
    """Contrast-phase shift: lesions and what contains them change by separate amounts."""

    probability: float = 0.0
    amount: Range = (-0.3, 0.3)
    """In standard deviations of the normalised image."""
    tissues: tuple[Values, ...] = enhancing_values(LITS_SCHEME)
    """Class values of each tissue that has an amount of its own."""

    def draw(self, random: CounterRandom, context: SampleContext) -> float | None:
        return draw_value(random, self.probability, self.amount) if self.tissues else None

    def draw_late(
        self, random: CounterRandom, context: SampleContext, drawn: float | None
    ) -> tuple[tuple[float, ...], ...] | None:
        """Return the amount of each tissue for each channel."""
        if drawn is None:
            return None
        amounts = [drawn]
        # The first amount of the first channel has been drawn in time.
        while len(amounts) < len(self.tissues) * context.channels:
            amounts.append(random.draw_uniform(*self.amount))
        rows = []
        for start in range(0, len(amounts), len(self.tissues)):
            rows.append(tuple(amounts[start : start + len(self.tissues)]))
        return tuple(rows)

    def apply(
        self, sample: Sample, parameters: tuple[tuple[float, ...], ...], context: SampleContext
    ) -> None:
        for channel, amounts in enumerate(parameters):
            if sample.present[channel]:
                sample.channels_DHW[channel] = shift_enhancement(
                    sample.channels_DHW[channel], sample.label_DHW, self.tissues, amounts
                )

    def describe(self, parameters: tuple[tuple[float, ...], ...]) -> list[str]:
        notes = []
        for channel, amounts in enumerate(parameters):
            shown = " ".join(f"{amount:+.2f}" for amount in amounts)
            which = f"channel {channel}: " if len(parameters) > 1 else ""
            notes.append(f"{which}enhancement {shown}")
        return notes


@dataclass(frozen=True)
class LesionCopyDraw:
    """Where copies of the patch's lesions are pasted."""

    flipped_axes: tuple[int, ...]
    """Axes along which the patch is mirrored before the shift."""
    shift: Index3
    """Voxels along z, y, x."""


@dataclass(frozen=True)
class LesionCopyTransform(Transform):
    """A mirrored and shifted copy of the patch's lesions in the organs that contain them."""

    probability: float = 0.0
    reach: float = 0.25
    """Largest shift, as a share of the patch's edge."""
    pairs: tuple[tuple[Values, Values], ...] = copyable_values(LITS_SCHEME)
    """Class values of lesions and of the tissue that their copies may replace."""

    def draw_late(
        self, random: CounterRandom, context: SampleContext, drawn: None
    ) -> LesionCopyDraw | None:
        if self.probability <= 0 or not self.pairs or not random.draw_bool(self.probability):
            return None
        # Mirroring makes the copy differ from its original, which is in the same patch.
        flipped = tuple(axis for axis in range(3) if random.draw_bool(0.5))
        shift = [
            round(random.draw_uniform(-1.0, 1.0) * self.reach * size) for size in context.patch_size
        ]
        return LesionCopyDraw(flipped, (shift[0], shift[1], shift[2]))

    def apply(self, sample: Sample, parameters: LesionCopyDraw, context: SampleContext) -> None:
        sample.channels_DHW, sample.label_DHW = copy_lesions(
            sample.channels_DHW,
            sample.label_DHW,
            self.pairs,
            parameters.flipped_axes,
            parameters.shift,
        )

    def describe(self, parameters: LesionCopyDraw) -> list[str]:
        return ["lesions copied"]


def shift_enhancement(
    image: Tensor, label: Tensor, tissues: Sequence[Values], amounts: Sequence[float]
) -> Tensor:
    """Add an amount to each tissue, in place."""
    for values, amount in zip(tissues, amounts, strict=True):
        image.add_(find_values(label, values), alpha=amount)
    return image


def copy_lesions(
    channels: Sequence[Tensor],
    label: Tensor,
    pairs: Sequence[tuple[Values, Values]],
    flipped_axes: tuple[int, ...],
    shift: Index3,
) -> tuple[list[Tensor], Tensor]:
    """Paste a mirrored and shifted copy of the patch's lesions into the organs that contain them.

    Copy-paste augmentation (Ghiasi et al. 2021, https://arxiv.org/abs/2012.07177) within one scan,
    so that noise, contrast phase and resolution fit. Voxels outside the organ are not pasted; the
    copy fades in over one voxel at its border.

    Args:
        channels: normalised images (D, H, W); not changed.
        label: uint8 label (D, H, W); not changed.
        pairs: class values of lesions and of the tissue that their copies may replace.
        flipped_axes: axes along which the patch is mirrored first.
        shift: voxels (z, y, x) by which the mirrored patch is moved.

    Returns:
        New images and label.
    """
    moved_label = _move(label, flipped_axes, shift)
    # Only the organ is overwritten: a lesion stays a lesion, and IGNORE stays IGNORE.
    pasted = torch.zeros_like(label, dtype=torch.bool)
    for lesion, free in pairs:
        pasted |= find_values(moved_label, lesion) & find_values(label, free)
    # The share of pasted neighbours: 1 inside the copy, less at its border.
    share = F.avg_pool3d(
        pasted[None, None].to(channels[0].dtype), 3, stride=1, padding=1, count_include_pad=True
    )[0, 0]
    weight = torch.where(pasted, share, torch.zeros_like(share))
    images = []
    for image in channels:
        source = _move(image, flipped_axes, shift)
        images.append(image + weight * (source - image))
    return images, torch.where(pasted, moved_label, label)


def find_values(label: Tensor, values: Values) -> Tensor:
    """Return where the label has one of the values."""
    mask = label == values[0]
    for value in values[1:]:
        mask |= label == value
    return mask


def _move(volume: Tensor, flipped_axes: tuple[int, ...], shift: Index3) -> Tensor:
    """Mirror, then move voxel p to p + shift; new voxels at the border are zero."""
    if flipped_axes:
        volume = volume.flip(flipped_axes)
    out = torch.zeros_like(volume)
    target, source = [], []
    for step, size in zip(shift, volume.shape, strict=True):
        target.append(slice(max(0, step), size + min(0, step)))
        source.append(slice(max(0, -step), size + min(0, -step)))
    out[tuple(target)] = volume[tuple(source)]
    return out
