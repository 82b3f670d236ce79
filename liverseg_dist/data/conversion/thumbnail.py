"""A small picture of a scan for the audit page: one axial and one coronal slice with outlines.

The slices with most of the lesions are shown; without lesions those with most of the organs; else
the middle.
"""

import numpy as np
from PIL import Image
from scipy import ndimage

from liverseg_dist.labels import IGNORE, LITS_SCHEME, LabelScheme
from liverseg_dist.pages import PADDING_RGB, structure_colours
from liverseg_dist.volume import Float3

ValueWindow = tuple[float, float]
"""Values shown as black and as white."""
WINDOW_HU: ValueWindow = (-160.0, 240.0)
WIDTHS, HEIGHT, GAP = (300, 300), 240, 6
"""Pixels: of the two slices, of the picture, between the slices."""


def render_thumbnail(
    image_zyx: np.ndarray,
    label_zyx: np.ndarray | None,
    spacing_mm: Float3,
    window: ValueWindow = WINDOW_HU,
    labels: LabelScheme = LITS_SCHEME,
) -> Image.Image:
    """Draw a scan in true proportions; the patient's right is on the left, as radiologists view it.

    Args:
        image_zyx: Voxels in RAS orientation.
        label_zyx: Label on the same grid; None without label.
        spacing_mm: Voxel size (z, y, x).
        window: Values shown as black and as white.
        labels: Scheme of the label.
    """
    z, y = _select_slices(image_zyx, label_zyx, labels)
    label = np.zeros((1, 1, 1), np.uint8) if label_zyx is None else label_zyx
    label = np.broadcast_to(label, image_zyx.shape)
    # Axes are flipped: pictures start at the top left, RAS at the patient's left, back and feet.
    axial = _draw_slice(
        image_zyx[z, ::-1, ::-1],
        label[z, ::-1, ::-1],
        (spacing_mm[1], spacing_mm[2]),
        WIDTHS[0],
        window,
        labels,
    )
    coronal = _draw_slice(
        image_zyx[::-1, y, ::-1],
        label[::-1, y, ::-1],
        (spacing_mm[0], spacing_mm[2]),
        WIDTHS[1],
        window,
        labels,
    )
    picture = np.zeros((HEIGHT, sum(WIDTHS) + GAP, 3), np.uint8)
    left = 0
    for width, rgb in zip(WIDTHS, (axial, coronal), strict=True):
        top, inset = (HEIGHT - rgb.shape[0]) // 2, (width - rgb.shape[1]) // 2
        picture[top : top + rgb.shape[0], left + inset : left + inset + rgb.shape[1]] = rgb
        left += width + GAP
    return Image.fromarray(picture)


def _select_slices(
    image: np.ndarray, label: np.ndarray | None, labels: LabelScheme
) -> tuple[int, int]:
    """Index of the axial (z) and of the coronal (y) slice."""
    if label is not None:
        is_lesion = np.zeros(labels.membership.shape[1], dtype=bool)
        for lesion in labels.lesions:
            is_lesion[list(lesion.values)] = True
        is_organ = ~is_lesion
        is_organ[0] = False
        is_organ[labels.num_classes :] = False
        for is_member in (is_lesion, is_organ):
            mask = is_member[label]
            if mask.any():
                z = int(mask.sum(axis=(1, 2)).argmax())
                return z, int(mask[z].sum(axis=1).argmax())
    return image.shape[0] // 2, image.shape[1] // 2


def _draw_slice(
    image: np.ndarray,
    label: np.ndarray,
    spacing_mm: tuple[float, float],
    max_width: int,
    window: ValueWindow,
    labels: LabelScheme,
) -> np.ndarray:
    """RGB (uint8) of one slice with outlines, at most HEIGHT x `max_width` pixels."""
    low, high = window
    share = np.clip((image.astype(np.float32) - low) / (high - low), 0, 1)
    grey = (share * 255).astype(np.uint8)
    height_mm, width_mm = image.shape[0] * spacing_mm[0], image.shape[1] * spacing_mm[1]
    scale = min(HEIGHT / height_mm, max_width / width_mm)
    # PIL's order: width, height.
    size = (
        max(1, min(max_width, round(width_mm * scale))),
        max(1, min(HEIGHT, round(height_mm * scale))),
    )
    resized = np.array(Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR))
    rgb = np.repeat(resized[..., None], 3, axis=2)
    label_picture = Image.fromarray(np.ascontiguousarray(label))
    classes = np.array(label_picture.resize(size, Image.Resampling.NEAREST))
    rgb[classes == IGNORE] = PADDING_RGB
    colours = structure_colours(labels)
    # Small structures last, so that a container does not cover what it contains.
    for structure in sorted(labels.structures, key=lambda item: -len(item.values)):
        mask = labels.mask_of(classes, structure)
        outline = mask & ~ndimage.binary_erosion(mask, border_value=1)
        rgb[outline] = colours[structure.name]
    return rgb
