"""Colours of structures and of prediction errors, for pages and pictures alike.

Readers with protanopia, deuteranopia and tritanopia can distinguish them
(`tests/evaluation/test_pages.py` simulates all three), and their contrast is 3:1 or more on white
and on the dark background of pictures.
"""

import colorsys
from collections.abc import Collection, Mapping, Sequence

from liverseg_dist.labels import LabelScheme

Rgb = tuple[int, int, int]

ORGAN_RGB: Rgb = (43, 140, 190)
LESION_RGB: Rgb = (199, 119, 0)
"""Outlines and fills of the first organ and of the first lesion, dots and bars of a chart."""
ORGAN_LINE_RGB: Rgb = (98, 186, 232)
LESION_LINE_RGB: Rgb = (255, 163, 51)
"""The same hues, lighter: outlines over the grey of a slice, where the colours above have too
little contrast."""
GOLDEN_RATIO = 0.618034
"""Hues at multiples of it stay apart, however many there are."""
PADDING_RGB: Rgb = (110, 110, 110)
"""Voxels without a class (label 255)."""

TRUE_POSITIVE: Rgb = (0, 158, 115)
FALSE_NEGATIVE: Rgb = (148, 94, 255)
FALSE_POSITIVE: Rgb = (240, 68, 44)

OVERLAY: Mapping[str, tuple[int, int, int, int]] = {
    "nothing": (0, 0, 0, 0),
    "truth_line": (255, 255, 255, 255),
    "prediction_line": (255, 214, 10, 255),
    "true_positive": (*TRUE_POSITIVE, 120),
    "false_negative": (*FALSE_NEGATIVE, 150),
    "false_positive": (*FALSE_POSITIVE, 150),
    "organ": (150, 160, 172, 90),
}
"""RGBA over a slice: outlines of both masks and kinds of compared voxels.

`organ` is drawn only where there is no image.
"""

SURFACE_RGB: Mapping[str, Rgb] = {
    "organ": (190, 178, 168),
    "touched": TRUE_POSITIVE,
    "missed": FALSE_NEGATIVE,
    "false": FALSE_POSITIVE,
}
"""Surfaces in the 3D view, by kind."""


def hex_colour(colour: tuple[int, ...]) -> str:
    """`#rrggbb` of the first three channels."""
    return "#" + "".join(f"{channel:02x}" for channel in colour[:3])


def structure_colours(labels: LabelScheme) -> dict[str, Rgb]:
    """Colour of each structure of a scheme."""
    lesions = {structure.name for structure in labels.lesions}
    return assign_colours(labels.structure_names, lesions)


def assign_colours(names: Sequence[str], lesions: Collection[str]) -> dict[str, Rgb]:
    """Colour of each structure: the first organ and the first lesion have fixed ones."""
    first_organ = next((name for name in names if name not in lesions), None)
    first_lesion = next((name for name in names if name in lesions), None)
    colours: dict[str, Rgb] = {}
    for number, name in enumerate(names):
        if name == first_organ:
            colours[name] = ORGAN_RGB
        elif name == first_lesion:
            colours[name] = LESION_RGB
        else:
            colours[name] = spread_colour(number)
    return colours


def spread_colour(number: int) -> Rgb:
    """A colour for a number; neighbouring numbers have distant hues.

    Saturation and brightness give a contrast of 3:1 on white for most hues.
    """
    red, green, blue = colorsys.hsv_to_rgb((0.35 + number * GOLDEN_RATIO) % 1, 0.75, 0.68)
    return round(255 * red), round(255 * green), round(255 * blue)


def class_colours(labels: LabelScheme) -> dict[int, Rgb]:
    """Colour of each class value without the background: that of its smallest structure."""
    by_name = structure_colours(labels)
    colours: dict[int, Rgb] = {}
    for structure in sorted(labels.structures, key=lambda structure: -len(structure.values)):
        colours |= dict.fromkeys(structure.values, by_name[structure.name])
    return dict(sorted(colours.items()))
