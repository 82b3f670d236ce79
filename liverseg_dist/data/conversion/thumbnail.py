"""A scan at a glance: the axial and the coronal slice through most of its tumour, or its liver, outlined."""

import numpy as np
from PIL import Image
from scipy import ndimage

from liverseg_dist.labels import IGNORE, LIVER, TUMOUR
from liverseg_dist.pages import PADDING_RGB, STRUCTURE_RGB
from liverseg_dist.volume import Float3

WINDOW_HU = (-160.0, 240.0)
WIDTHS, HEIGHT, GAP = (300, 300), 240, 6


def render_thumbnail(
    image_zyx: np.ndarray, label_zyx: np.ndarray | None, spacing_mm: Float3
) -> Image.Image:
    """RAS voxels in; the picture shows the patient's right on the left, as radiologists see it. True proportions."""
    z, y = _places(image_zyx, label_zyx)
    label = np.zeros((1, 1, 1), np.uint8) if label_zyx is None else label_zyx
    label = np.broadcast_to(label, image_zyx.shape)
    tiles = (
        (image_zyx[z, ::-1, ::-1], label[z, ::-1, ::-1], spacing_mm[1:]),
        (image_zyx[::-1, y, ::-1], label[::-1, y, ::-1], (spacing_mm[0], spacing_mm[2])),
    )
    sheet = np.zeros((HEIGHT, sum(WIDTHS) + GAP, 3), np.uint8)
    left = 0
    for width, tile in zip(WIDTHS, tiles, strict=True):
        rgb = _tile(*tile, width)
        top, inset = (HEIGHT - rgb.shape[0]) // 2, (width - rgb.shape[1]) // 2
        sheet[top : top + rgb.shape[0], left + inset : left + inset + rgb.shape[1]] = rgb
        left += width + GAP
    return Image.fromarray(sheet)


def _places(image: np.ndarray, label: np.ndarray | None) -> tuple[int, int]:
    for value in (TUMOUR, LIVER):
        sought = None if label is None else label == value
        if sought is not None and sought.any():
            z = int(sought.sum(axis=(1, 2)).argmax())
            return z, int(sought[z].sum(axis=1).argmax())
    return image.shape[0] // 2, image.shape[1] // 2


def _tile(
    hu: np.ndarray, label: np.ndarray, spacing_mm: tuple[float, float], width: int
) -> np.ndarray:
    low, high = WINDOW_HU
    grey = (np.clip((hu.astype(np.float32) - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    extent = (hu.shape[0] * spacing_mm[0], hu.shape[1] * spacing_mm[1])
    scale = min(HEIGHT / extent[0], width / extent[1])
    size = (
        max(1, min(width, round(extent[1] * scale))),
        max(1, min(HEIGHT, round(extent[0] * scale))),
    )
    rgb = np.repeat(
        np.array(Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR))[..., None],
        3,
        axis=2,
    )
    known = np.array(
        Image.fromarray(np.ascontiguousarray(label)).resize(size, Image.Resampling.NEAREST)
    )
    rgb[known == IGNORE] = PADDING_RGB
    for value, colour in STRUCTURE_RGB.items():
        mask = (known >= value) & (known != IGNORE)
        rgb[mask & ~ndimage.binary_erosion(mask, border_value=1)] = colour
    return rgb
