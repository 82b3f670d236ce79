"""A picture of what the network is fed: each sample as stored and as augmented, with and without its labels.

Axial slices in radiological display: the patient's right is on the left, anterior is up. Colours are those of the
audit's pictures; a legend stands at the top left.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from liverseg_dist.labels import IGNORE, LIVER, TUMOUR
from liverseg_dist.pages import LEGEND, PADDING_RGB, STRUCTURE_RGB

TILE_PX = 224
_GAP_PX, _TEXT_PX, _HEADER_PX = 6, 200, 24
_COLOURS = {**STRUCTURE_RGB, IGNORE: PADDING_RGB}
_OPACITY = 0.4
_TEXT_COLOUR = (230, 230, 230)
_SWATCH_PX = 12
_COLUMNS = ("as stored", "labels", "augmented", "labels")


@dataclass(frozen=True, eq=False)
class PreviewRow:
    """One sample; images are normalised (float, D H W), labels uint8."""

    title: str
    notes: tuple[str, ...]
    stored: tuple[np.ndarray, np.ndarray]
    augmented: tuple[np.ndarray, np.ndarray]
    black: float
    """Image value shown black (the lower clipping bound)."""
    white: float


def render_preview(rows: list[PreviewRow]) -> Image.Image:
    """All samples below each other."""
    font = ImageFont.load_default(size=13)
    step = TILE_PX + _GAP_PX
    size = (_TEXT_PX + step * len(_COLUMNS), _HEADER_PX + step * len(rows))
    picture = Image.new("RGB", size, (20, 20, 20))
    draw = ImageDraw.Draw(picture)
    _draw_legend(draw, font)
    for column, name in enumerate(_COLUMNS):
        draw.text((_TEXT_PX + column * step + 2, 4), name, fill=_TEXT_COLOUR, font=font)
    for number, row in enumerate(rows):
        top = _HEADER_PX + number * step
        draw.multiline_text(
            (8, top + 4),
            "\n".join((row.title, *row.notes)),
            fill=_TEXT_COLOUR,
            font=font,
            spacing=5,
        )
        for column, (image, label, painted) in enumerate(_list_tiles(row)):
            tile = _render_tile(image, label if painted else None, row.black, row.white)
            picture.paste(tile, (_TEXT_PX + column * step, top))
    return picture


def _draw_legend(
    draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    """A swatch and a name for each colour, beside the headings of the columns."""
    left, top = 8, (_HEADER_PX - _SWATCH_PX) // 2
    for name, colour in LEGEND:
        draw.rectangle(
            (left, top, left + _SWATCH_PX, top + _SWATCH_PX), fill=colour, outline=_TEXT_COLOUR
        )
        left += _SWATCH_PX + 4
        draw.text((left, 4), name, fill=_TEXT_COLOUR, font=font)
        left += int(draw.textlength(name, font=font)) + 8


def _list_tiles(row: PreviewRow) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    tiles = []
    for image, label in (row.stored, row.augmented):
        z = find_most_informative_slice(label)
        tiles += [(image[z], label[z], False), (image[z], label[z], True)]
    return tiles


def find_most_informative_slice(label_DHW: np.ndarray) -> int:
    """The slice with most tumour; without tumour the one with most liver; without either the middle one."""
    for wanted in (TUMOUR, LIVER):
        areas = (label_DHW == wanted).sum(axis=(1, 2))
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
            inside = label_HW == value
            rgb[inside] = (1 - _OPACITY) * rgb[inside] + _OPACITY * np.array(colour)
    upright = np.ascontiguousarray(rgb[::-1, ::-1]).astype(np.uint8)
    tile = Image.fromarray(upright)
    scale = TILE_PX / max(tile.size)
    fitted = tile.resize(
        (round(tile.width * scale), round(tile.height * scale)), Image.Resampling.NEAREST
    )
    canvas = Image.new("RGB", (TILE_PX, TILE_PX), (20, 20, 20))
    canvas.paste(fitted, ((TILE_PX - fitted.width) // 2, (TILE_PX - fitted.height) // 2))
    return canvas
