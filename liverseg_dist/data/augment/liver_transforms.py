"""Transforms that depend on the label: contrast phase and copies of tumours.

Both take numbers from the random stream after all other transforms (`Transform.draw_late`).
"""

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
from liverseg_dist.labels import LIVER, TUMOUR
from liverseg_dist.volume import Index3

Tensor = torch.Tensor


@dataclass(frozen=True)
class EnhancementTransform(Transform):
    """Contrast-phase shift: liver and tumour change by separate amounts."""

    probability: float = 0.0
    amount: Range = (-0.3, 0.3)
    """In standard deviations of the normalised image."""

    def draw(self, random: CounterRandom, context: SampleContext) -> float | None:
        return draw_value(random, self.probability, self.amount)

    def draw_late(
        self, random: CounterRandom, context: SampleContext, drawn: float | None
    ) -> tuple[float, float] | None:
        return None if drawn is None else (drawn, random.draw_uniform(*self.amount))

    def apply(
        self, sample: Sample, parameters: tuple[float, float], context: SampleContext
    ) -> None:
        liver, tumour = parameters
        sample.image_DHW = shift_enhancement(sample.image_DHW, sample.label_DHW, liver, tumour)

    def describe(self, parameters: tuple[float, float]) -> list[str]:
        liver, tumour = parameters
        return [f"enhancement {liver:+.2f} {tumour:+.2f}"]


@dataclass(frozen=True)
class TumourCopyDraw:
    """Where copies of the patch's tumours are pasted."""

    flipped_axes: tuple[int, ...]
    """Axes along which the patch is mirrored before the shift."""
    shift: Index3
    """Voxels along z, y, x."""


@dataclass(frozen=True)
class TumourCopyTransform(Transform):
    """A mirrored and shifted copy of the patch's tumours in the patch's liver."""

    probability: float = 0.0
    reach: float = 0.25
    """Largest shift, as a share of the patch's edge."""

    def draw_late(
        self, random: CounterRandom, context: SampleContext, drawn: None
    ) -> TumourCopyDraw | None:
        if self.probability <= 0 or not random.draw_bool(self.probability):
            return None
        # Mirroring makes the copy differ from its original, which is in the same patch.
        flipped = tuple(axis for axis in range(3) if random.draw_bool(0.5))
        shift = [
            round(random.draw_uniform(-1.0, 1.0) * self.reach * size) for size in context.patch_size
        ]
        return TumourCopyDraw(flipped, (shift[0], shift[1], shift[2]))

    def apply(self, sample: Sample, parameters: TumourCopyDraw, context: SampleContext) -> None:
        sample.image_DHW, sample.label_DHW = copy_tumours(
            sample.image_DHW, sample.label_DHW, parameters.flipped_axes, parameters.shift
        )

    def describe(self, parameters: TumourCopyDraw) -> list[str]:
        return ["tumours copied"]


def shift_enhancement(image: Tensor, label: Tensor, liver: float, tumour: float) -> Tensor:
    """Add one amount to the liver's parenchyma and another one to its tumours, in place."""
    return image.add_(label == LIVER, alpha=liver).add_(label == TUMOUR, alpha=tumour)


def copy_tumours(
    image: Tensor, label: Tensor, flipped_axes: tuple[int, ...], shift: Index3
) -> tuple[Tensor, Tensor]:
    """Paste a mirrored and shifted copy of the patch's tumours into its liver.

    Copy-paste augmentation (Ghiasi et al. 2021, https://arxiv.org/abs/2012.07177) within one scan,
    so that noise, contrast phase and resolution fit. Voxels outside the liver are not pasted; the
    copy fades in over one voxel at its border.

    Args:
        image: normalised image (D, H, W); not changed.
        label: uint8 label (D, H, W); not changed.
        flipped_axes: axes along which the patch is mirrored first.
        shift: voxels (z, y, x) by which the mirrored patch is moved.

    Returns:
        New image and label.
    """
    tumour = label == TUMOUR
    mirrored = image
    if flipped_axes:
        tumour, mirrored = tumour.flip(flipped_axes), image.flip(flipped_axes)
    # Only liver is overwritten: a tumour stays a tumour, and IGNORE stays IGNORE.
    pasted = _shift_voxels(tumour, shift) & (label == LIVER)
    source = _shift_voxels(mirrored, shift)
    # The share of pasted neighbours: 1 inside the copy, less at its border.
    share = F.avg_pool3d(
        pasted[None, None].to(image.dtype), 3, stride=1, padding=1, count_include_pad=True
    )[0, 0]
    weight = torch.where(pasted, share, torch.zeros_like(share))
    new_image = image + weight * (source - image)
    return new_image, torch.where(pasted, torch.full_like(label, TUMOUR), label)


def _shift_voxels(volume: Tensor, shift: Index3) -> Tensor:
    """Move voxel p to p + shift; new voxels at the border are zero."""
    out = torch.zeros_like(volume)
    target, source = [], []
    for step, size in zip(shift, volume.shape, strict=True):
        target.append(slice(max(0, step), size + min(0, step)))
        source.append(slice(max(0, -step), size + min(0, -step)))
    out[tuple(target)] = volume[tuple(source)]
    return out
