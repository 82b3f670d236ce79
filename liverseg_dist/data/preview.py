"""Picture of training samples: as stored and as augmented, each with and without its labels.

Axial slices in radiological display: the patient's right is on the left, anterior is up. Colours
are those of the audit's pictures; a legend is at the top left. `liverseg preview` writes it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from liverseg_dist.labels import IGNORE, LIVER, TUMOUR
from liverseg_dist.pages import LEGEND, PADDING_RGB, STRUCTURE_RGB

TILE_PX = 224
_GAP_PX, _TEXT_PX, _HEADER_PX = 6, 200, 24
_MARGIN_PX, _SWATCH_PX = 8, 12
_LINE_SPACING_PX = 5
_FONT_SIZE = 13
_COLOURS = {**STRUCTURE_RGB, IGNORE: PADDING_RGB}
_OPACITY = 0.4
_BACKGROUND = (20, 20, 20)
_TEXT_COLOUR = (230, 230, 230)
_COLUMNS = ("as stored", "labels", "augmented", "labels")

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, eq=False)
class PreviewRow:
    """One sample: normalised images (float, D H W) and labels (uint8, D H W)."""

    title: str
    notes: tuple[str, ...]
    stored: tuple[np.ndarray, np.ndarray]
    """Image and label."""
    augmented: tuple[np.ndarray, np.ndarray]
    """Image and label."""
    black: float
    """Image value that is shown black (the lower clipping bound)."""
    white: float
    """Image value that is shown white."""


def render_preview(rows: list[PreviewRow]) -> Image.Image:
    """Render all samples, one row each."""
    font = ImageFont.load_default(size=_FONT_SIZE)
    step = TILE_PX + _GAP_PX
    size = (_TEXT_PX + step * len(_COLUMNS), _HEADER_PX + step * len(rows))
    picture = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    _draw_legend(draw, font)
    for column, name in enumerate(_COLUMNS):
        draw.text((_TEXT_PX + column * step + 2, 4), name, fill=_TEXT_COLOUR, font=font)
    for number, row in enumerate(rows):
        top = _HEADER_PX + number * step
        draw.multiline_text(
            (_MARGIN_PX, top + 4),
            "\n".join((row.title, *row.notes)),
            fill=_TEXT_COLOUR,
            font=font,
            spacing=_LINE_SPACING_PX,
        )
        for column, (image, label) in enumerate(_iterate_tiles(row)):
            tile = _render_tile(image, label, row.black, row.white)
            picture.paste(tile, (_TEXT_PX + column * step, top))
    return picture


def _draw_legend(draw: ImageDraw.ImageDraw, font: Font) -> None:
    """Draw a swatch and a name for each colour, in the line of the column headings."""
    left, top = _MARGIN_PX, (_HEADER_PX - _SWATCH_PX) // 2
    for name, colour in LEGEND:
        box = (left, top, left + _SWATCH_PX, top + _SWATCH_PX)
        draw.rectangle(box, fill=colour, outline=_TEXT_COLOUR)
        left += _SWATCH_PX + 4
        draw.text((left, 4), name, fill=_TEXT_COLOUR, font=font)
        left += int(draw.textlength(name, font=font)) + _MARGIN_PX


def _iterate_tiles(row: PreviewRow) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Image and label slice (H W) for each column; no label for the columns without labels."""
    for image, label in (row.stored, row.augmented):
        z = find_most_informative_slice(label)
        yield image[z], None
        yield image[z], label[z]


def find_most_informative_slice(label_DHW: np.ndarray) -> int:
    """The slice with most tumour; without tumour, with most liver; without both, the middle one."""
    for value in (TUMOUR, LIVER):
        areas = (label_DHW == value).sum(axis=(1, 2))
        if areas.any():
            return int(areas.argmax())
    return label_DHW.shape[0] // 2


def _render_tile(
    image_HW: np.ndarray, label_HW: np.ndarray | None, black: float, white: float
) -> Image.Image:
    grey = np.clip((image_HW - black) / (white - black), 0, 1) * 255
    rgb = np.repeat(grey[..., None], 3, axis=2)
    if label_HW is not None:
        for value, colour in _COLOURS.items():
            mask = label_HW == value
            rgb[mask] = (1 - _OPACITY) * rgb[mask] + _OPACITY * np.array(colour)
    # Arrays run to the right and to anterior (RAS); the display runs to the left and down.
    upright = np.ascontiguousarray(rgb[::-1, ::-1]).astype(np.uint8)
    tile = Image.fromarray(upright)
    # The longer side fills the tile, the aspect ratio is kept.
    scale = TILE_PX / max(tile.size)
    size = (round(tile.width * scale), round(tile.height * scale))
    # No interpolation: the picture shows the voxels that the network receives.
    fitted = tile.resize(size, Image.Resampling.NEAREST)
    canvas = Image.new("RGB", (TILE_PX, TILE_PX), _BACKGROUND)
    canvas.paste(fitted, ((TILE_PX - fitted.width) // 2, (TILE_PX - fitted.height) // 2))
    return canvas
