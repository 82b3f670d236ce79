"""A picture of a data set of phantoms: liverseg phantom DST --cases 12 --montage look.png

Each channel of a case has an axial slice without and with outlines, and a coronal slice with
outlines. Channels are shown on the grid of the label, so that a shift between CT and MR is visible
at the outlines.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from liverseg_dist.data.io.nifti import read_nifti
from liverseg_dist.labels import LIVER, TUMOUR
from liverseg_dist.pages.palette import LESION_RGB, ORGAN_RGB, spread_colour
from liverseg_dist.volume import CANONICAL_ORIENTATION, Grid, Volume

WINDOW_HU = (-150.0, 250.0)
MR_PERCENTILE = 99.3
TILE_PX = 330
TILE_MM = 390.0
TILES_PER_CHANNEL = 3


def draw_montage(folder: Path, case_ids: list[str], columns: int = 2) -> Image.Image:
    """Draw cases in the Task03 layout."""
    rows = []
    for case_id in case_ids:
        image = read_nifti(folder / "imagesTr" / f"{case_id}.nii.gz")
        label = read_nifti(folder / "labelsTr" / f"{case_id}.nii.gz", "label")
        rows.append(
            draw_case_row({"CT": image}, label, TUMOUR if TUMOUR in label.voxels else LIVER)
        )
    return arrange_rows(rows, columns)


def arrange_rows(rows: list[np.ndarray], columns: int) -> Image.Image:
    """Return a picture of the rows of tiles, several side by side."""
    # Black rows complete the last line.
    rows = rows + [np.zeros_like(rows[0])] * (-len(rows) % columns)
    lines = []
    for start in range(0, len(rows), columns):
        lines.append(np.concatenate(rows[start : start + columns], axis=1))
    return Image.fromarray(np.concatenate(lines, axis=0))


def draw_case_row(
    channels: Mapping[str, Volume], label: Volume, shown_value: int, has_region: bool = True
) -> np.ndarray:
    """Draw three tiles for each channel, in radiological display: the patient's right is left.

    Args:
        channels: images by the name of their channel; that of a CT is CT.
        label: label on any grid.
        shown_value: the slices are those with most voxels of this label value.
        has_region: whether label 1 is the liver and label 2 its tumours.
    """
    label = label.reoriented(CANONICAL_ORIENTATION)
    is_shown = label.voxels == shown_value
    z = int(is_shown.sum(axis=(1, 2)).argmax())
    y = int(is_shown.sum(axis=(0, 2)).argmax())
    spacing_z, spacing_y, spacing_x = label.spacing_mm
    tiles = []
    for name, image in channels.items():
        grey = _scale_to_grey(_sample_on_grid(image, label.grid), name == "CT")
        axial = (grey[z, ::-1, ::-1], label.voxels[z, ::-1, ::-1], (spacing_y, spacing_x))
        front = (grey[::-1, y, ::-1], label.voxels[::-1, y, ::-1], (spacing_z, spacing_x))
        tiles += [
            _draw_tile(*axial, False, has_region),
            _draw_tile(*axial, True, has_region),
            _draw_tile(*front, True, has_region),
        ]
    return np.concatenate(tiles, axis=1)


def _sample_on_grid(image: Volume, grid: Grid) -> np.ndarray:
    """Return the image on another grid by linear interpolation in the world."""
    image = image.reoriented(CANONICAL_ORIENTATION)
    if image.grid == grid:
        return image.voxels
    to_image = np.linalg.inv(image.affine) @ grid.affine
    # Arrays are z, y, x; affines x, y, z.
    matrix, offset = to_image[:3, :3][::-1, ::-1], to_image[:3, 3][::-1]
    return ndimage.affine_transform(
        image.voxels.astype(np.float32), matrix, offset, grid.shape, order=1
    )


def _scale_to_grey(values: np.ndarray, is_ct: bool) -> np.ndarray:
    """Scale a window of HU, or from 0 to almost the largest MR value, to 0 to 255."""
    low, high = WINDOW_HU if is_ct else (0.0, float(np.percentile(values, MR_PERCENTILE)))
    return (np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)


def _outline_colour(value: int) -> tuple[int, int, int]:
    """Return the colour of a label value: those of organ and lesion first."""
    fixed = {1: ORGAN_RGB, 2: LESION_RGB}
    return fixed.get(value) or spread_colour(value)


def _draw_tile(
    grey: np.ndarray,
    label: np.ndarray,
    spacing_mm: tuple[float, float],
    outlines: bool,
    has_region: bool,
) -> np.ndarray:
    """Draw the middle TILE_MM of a slice."""
    size = [
        max(1, round(n * s / TILE_MM * TILE_PX))
        for n, s in zip(grey.shape, spacing_mm, strict=True)
    ]
    scaled = np.array(Image.fromarray(grey).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    known = np.array(Image.fromarray(label).resize((size[1], size[0]), Image.Resampling.NEAREST))
    rgb = np.repeat(scaled[..., None], 3, axis=2)
    if outlines:
        for value in np.unique(known[known > 0]).tolist():
            mask = known == value
            if has_region and value == LIVER:
                mask |= known == TUMOUR
            rgb[mask & ~ndimage.binary_erosion(mask)] = _outline_colour(value)
    canvas = np.zeros((TILE_PX, TILE_PX, 3), np.uint8)
    cut = [(max(0, (n - TILE_PX) // 2), max(0, (TILE_PX - n) // 2), min(n, TILE_PX)) for n in size]
    (from_y, to_y, rows), (from_x, to_x, columns) = cut
    canvas[to_y : to_y + rows, to_x : to_x + columns] = rgb[
        from_y : from_y + rows, from_x : from_x + columns
    ]
    return canvas
