"""A picture of a data set in the Task03 layout.

Each case has an axial slice without and with outlines, and a coronal slice with outlines:
liverseg phantom DST --cases 12 --montage look.png
"""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from liverseg_dist.data.io.nifti import read_nifti
from liverseg_dist.labels import LIVER, TUMOUR
from liverseg_dist.pages import STRUCTURE_RGB
from liverseg_dist.volume import CANONICAL_ORIENTATION

WINDOW_HU = (-150.0, 250.0)
TILE_PX = 330
TILE_MM = 390.0


def draw_montage(folder: Path, case_ids: list[str], columns: int = 2) -> Image.Image:
    """Draw the picture in radiological display: the patient's right is on the left side."""
    rows = [_draw_case_row(folder, case_id) for case_id in case_ids]
    # Black rows complete the last line.
    rows += [np.zeros_like(rows[0])] * (-len(rows) % columns)
    lines = []
    for start in range(0, len(rows), columns):
        lines.append(np.concatenate(rows[start : start + columns], axis=1))
    return Image.fromarray(np.concatenate(lines, axis=0))


def _draw_case_row(folder: Path, case_id: str) -> np.ndarray:
    image = read_nifti(folder / "imagesTr" / f"{case_id}.nii.gz").reoriented(CANONICAL_ORIENTATION)
    label = read_nifti(folder / "labelsTr" / f"{case_id}.nii.gz", "label").reoriented(
        CANONICAL_ORIENTATION
    )
    structure = TUMOUR if (label.voxels == TUMOUR).any() else LIVER
    z = int((label.voxels == structure).sum(axis=(1, 2)).argmax())
    y = int((label.voxels == structure).sum(axis=(0, 2)).argmax())
    in_plane = image.spacing_mm[1], image.spacing_mm[2]
    coronal = image.spacing_mm[0], image.spacing_mm[2]
    axial = (image.voxels[z, ::-1, ::-1], label.voxels[z, ::-1, ::-1])
    front = (image.voxels[::-1, y, ::-1], label.voxels[::-1, y, ::-1])
    tiles = [
        _draw_tile(*axial, in_plane, False),
        _draw_tile(*axial, in_plane, True),
        _draw_tile(*front, coronal, True),
    ]
    return np.concatenate(tiles, axis=1)


def _draw_tile(
    hu: np.ndarray, label: np.ndarray, spacing_mm: tuple[float, float], outlines: bool
) -> np.ndarray:
    """Draw the middle TILE_MM of a slice."""
    low, high = WINDOW_HU
    grey = (np.clip((hu - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    size = [
        max(1, round(n * s / TILE_MM * TILE_PX)) for n, s in zip(hu.shape, spacing_mm, strict=True)
    ]
    scaled = np.array(Image.fromarray(grey).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    known = np.array(Image.fromarray(label).resize((size[1], size[0]), Image.Resampling.NEAREST))
    rgb = np.repeat(scaled[..., None], 3, axis=2)
    if outlines:
        for value, colour in STRUCTURE_RGB.items():
            mask = known >= value
            rgb[mask & ~ndimage.binary_erosion(mask)] = colour
    canvas = np.zeros((TILE_PX, TILE_PX, 3), np.uint8)
    cut = [(max(0, (n - TILE_PX) // 2), max(0, (TILE_PX - n) // 2), min(n, TILE_PX)) for n in size]
    (from_y, to_y, rows), (from_x, to_x, columns) = cut
    canvas[to_y : to_y + rows, to_x : to_x + columns] = rgb[
        from_y : from_y + rows, from_x : from_x + columns
    ]
    return canvas
