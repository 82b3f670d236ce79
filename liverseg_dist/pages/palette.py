"""Colours of structures and of prediction errors, for pages and pictures alike.

Readers with protanopia, deuteranopia and tritanopia can distinguish them
(`tests/evaluation/test_pages.py` simulates all three), and their contrast is 3:1 or more on white
and on the dark background of pictures.
"""

from collections.abc import Mapping

from liverseg_dist.labels import LIVER, TUMOUR

Rgb = tuple[int, int, int]

STRUCTURE_RGB: Mapping[int, Rgb] = {LIVER: (43, 140, 190), TUMOUR: (199, 119, 0)}
"""Outlines and fills of a label, dots and bars of a chart."""
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
    "liver": (150, 160, 172, 90),
}
"""RGBA over a CT slice: outlines of both masks and kinds of tumour voxels.

`liver` is drawn only where there is no CT.
"""

LESION_RGB: Mapping[str, Rgb] = {
    "liver": (190, 178, 168),
    "touched": TRUE_POSITIVE,
    "missed": FALSE_NEGATIVE,
    "false": FALSE_POSITIVE,
}
"""Surfaces in the 3D view, by kind."""


def hex_colour(colour: tuple[int, ...]) -> str:
    """`#rrggbb` of the first three channels."""
    return "#" + "".join(f"{channel:02x}" for channel in colour[:3])


LEGEND = (
    ("liver", STRUCTURE_RGB[LIVER]),
    ("tumour", STRUCTURE_RGB[TUMOUR]),
    ("padding", PADDING_RGB),
)
"""Name and colour of what pictures of labels show."""
