"""Colours and base style sheet of all HTML pages and pictures.

The report, the audit page, the sweep page and all pictures use them, so that a colour has one
meaning everywhere.
"""

from liverseg_dist.pages.palette import (
    OVERLAY,
    PADDING_RGB,
    class_colours,
    hex_colour,
    spread_colour,
    structure_colours,
)
from liverseg_dist.pages.theme import load_script, load_theme

__all__ = [
    "OVERLAY",
    "PADDING_RGB",
    "class_colours",
    "hex_colour",
    "load_script",
    "load_theme",
    "spread_colour",
    "structure_colours",
]
