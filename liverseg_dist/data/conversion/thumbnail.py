"""A small picture of a stored slab for the audit page: axial and coronal, with the label's outline."""

import numpy as np
from PIL import Image
from scipy import ndimage

from liverseg_dist.labels import IGNORE, LIVER, TUMOUR
from liverseg_dist.volume import Float3

WINDOW_HU = (-160.0, 240.0)
HEIGHT = 220
COLOURS = {LIVER: (255, 190, 60), TUMOUR: (235, 60, 60)}


def thumbnail(image_zyx: np.ndarray, label_zyx: np.ndarray, spacing_mm: Float3) -> Image.Image:
    """RAS voxels in; the picture shows the patient's right on the left, as radiologists look at it."""
    label = np.where(label_zyx == IGNORE, 0, label_zyx)
    sought = label == (TUMOUR if (label == TUMOUR).any() else LIVER)
    z = int(sought.sum(axis=(1, 2)).argmax()) if sought.any() else image_zyx.shape[0] // 2
    y = int(sought.sum(axis=(0, 2)).argmax()) if sought.any() else image_zyx.shape[1] // 2
    tiles = [
        _tile(image_zyx[z, ::-1, ::-1], label[z, ::-1, ::-1], spacing_mm[1] / spacing_mm[2]),
        _tile(image_zyx[::-1, y, ::-1], label[::-1, y, ::-1], spacing_mm[0] / spacing_mm[2]),
    ]
    return Image.fromarray(np.concatenate(tiles, axis=1))


def _tile(hu: np.ndarray, label: np.ndarray, pixel_aspect: float) -> np.ndarray:
    low, high = WINDOW_HU
    grey = (np.clip((hu.astype(np.float32) - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    width = max(1, round(HEIGHT * hu.shape[1] / (hu.shape[0] * pixel_aspect)))
    scaled = np.array(Image.fromarray(grey).resize((width, HEIGHT), Image.Resampling.BILINEAR))
    known = np.array(Image.fromarray(label.astype(np.uint8)).resize((width, HEIGHT), Image.Resampling.NEAREST))
    rgb = np.repeat(scaled[..., None], 3, axis=2)
    for value, colour in COLOURS.items():
        mask = known >= value
        rgb[mask & ~ndimage.binary_erosion(mask)] = colour
    return rgb
