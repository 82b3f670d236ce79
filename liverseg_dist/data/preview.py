"""Picture of training samples: as stored and as augmented, each with and without its labels.

Axial slices in radiological display: the patient's right is on the left, anterior is up. Colours
are those of the audit's pictures; a legend is at the top left. `liverseg preview` writes it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from liverseg_dist.labels import BACKGROUND, IGNORE, LITS_SCHEME, LabelScheme
from liverseg_dist.pages import PADDING_RGB, class_colours

TILE_PX = 224
_GAP_PX, _TEXT_PX, _HEADER_PX = 6, 200, 24
_MARGIN_PX, _SWATCH_PX = 8, 12
_LINE_SPACING_PX = 5
_FONT_SIZE = 13
_OPACITY = 0.4
_BACKGROUND = (20, 20, 20)
_TEXT_COLOUR = (230, 230, 230)
_COLUMNS = ("as stored", "labels", "augmented", "labels")

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Rgb = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class PreviewRow:
    """One channel of a sample: normalised images (float, D H W) and labels (uint8, D H W)."""

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


def render_preview(rows: Sequence[PreviewRow], labels: LabelScheme = LITS_SCHEME) -> Image.Image:
    """Render samples, one row for each channel.

    Args:
        rows: the channels of the samples.
        labels: scheme of the labels.
    """
    font = ImageFont.load_default(size=_FONT_SIZE)
    step = TILE_PX + _GAP_PX
    width = _TEXT_PX + step * len(_COLUMNS)
    colours = choose_class_colours(labels)
    legend, lines_above_headings = _place_legend(labels, colours, font, width)
    header_px = _HEADER_PX * (1 + lines_above_headings)
    picture = Image.new("RGB", (width, header_px + step * len(rows)), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    _draw_legend(draw, font, legend)
    headings_px = header_px - _HEADER_PX + 4
    for column, name in enumerate(_COLUMNS):
        place = (_TEXT_PX + column * step + 2, headings_px)
        draw.text(place, name, fill=_TEXT_COLOUR, font=font)
    for number, row in enumerate(rows):
        top = header_px + number * step
        draw.multiline_text(
            (_MARGIN_PX, top + 4),
            "\n".join((row.title, *row.notes)),
            fill=_TEXT_COLOUR,
            font=font,
            spacing=_LINE_SPACING_PX,
        )
        for column, (image, label) in enumerate(_iterate_tiles(row, labels)):
            tile = _render_tile(image, label, row, colours)
            picture.paste(tile, (_TEXT_PX + column * step, top))
    return picture


def choose_class_colours(labels: LabelScheme) -> dict[int, Rgb]:
    """Return a colour for each class value without the background, and for padding."""
    return {**class_colours(labels), IGNORE: PADDING_RGB}


LegendEntry = tuple[int, int, str, Rgb]
"""Left edge in pixels, line, name, colour."""


def _place_legend(
    labels: LabelScheme, colours: Mapping[int, Rgb], font: Font, width: int
) -> tuple[list[LegendEntry], int]:
    """Place a swatch and a name for each colour, in the line of the headings if they fit there.

    Returns:
        The entries, and the number of their lines above that of the headings.
    """
    names = {**dict(enumerate(labels.class_names)), IGNORE: "padding"}
    sizes = []
    for value in colours:
        sizes.append(_SWATCH_PX + 4 + int(font.getlength(names[value])) + _MARGIN_PX)
    entries: list[LegendEntry] = []
    left, line = _MARGIN_PX, 0
    for (value, colour), size in zip(colours.items(), sizes, strict=True):
        if left + size > width:
            left, line = _MARGIN_PX, line + 1
        entries.append((left, line, names[value], colour))
        left += size
    fits_beside_headings = line == 0 and left <= _TEXT_PX + _MARGIN_PX
    return entries, 0 if fits_beside_headings else line + 1


def _draw_legend(draw: ImageDraw.ImageDraw, font: Font, legend: Sequence[LegendEntry]) -> None:
    for left, line, name, colour in legend:
        top = line * _HEADER_PX + (_HEADER_PX - _SWATCH_PX) // 2
        box = (left, top, left + _SWATCH_PX, top + _SWATCH_PX)
        draw.rectangle(box, fill=colour, outline=_TEXT_COLOUR)
        place = (left + _SWATCH_PX + 4, line * _HEADER_PX + 4)
        draw.text(place, name, fill=_TEXT_COLOUR, font=font)


def _iterate_tiles(
    row: PreviewRow, labels: LabelScheme
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Image and label slice (H W) for each column; no label for the columns without labels."""
    for image, label in (row.stored, row.augmented):
        z = find_most_informative_slice(label, labels)
        yield image[z], None
        yield image[z], label[z]


def find_most_informative_slice(label_DHW: np.ndarray, labels: LabelScheme = LITS_SCHEME) -> int:
    """The slice with most lesion; without lesions, with most foreground; without both, the middle."""
    is_lesion = np.zeros(label_DHW.shape, dtype=bool)
    for lesion in labels.lesions:
        is_lesion |= labels.mask_of(label_DHW, lesion)
    is_foreground = (label_DHW != BACKGROUND) & (label_DHW != IGNORE)
    for mask in (is_lesion, is_foreground):
        areas = mask.sum(axis=(1, 2))
        if areas.any():
            return int(areas.argmax())
    return label_DHW.shape[0] // 2


def _render_tile(
    image_HW: np.ndarray,
    label_HW: np.ndarray | None,
    row: PreviewRow,
    colours: Mapping[int, Rgb],
) -> Image.Image:
    grey = np.clip((image_HW - row.black) / (row.white - row.black), 0, 1) * 255
    rgb = np.repeat(grey[..., None], 3, axis=2)
    if label_HW is not None:
        for value, colour in colours.items():
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
