"""What all HTML pages and pictures have in common: colours and the base style sheet.

The report, the audit, the sweep page and the pictures import from here, so that a colour means one thing everywhere.
"""

from liverseg_dist.pages.palette import LEGEND, OVERLAY, PADDING_RGB, STRUCTURE_RGB, hex_colour
from liverseg_dist.pages.theme import load_script, load_theme

__all__ = [
    "LEGEND",
    "OVERLAY",
    "PADDING_RGB",
    "STRUCTURE_RGB",
    "hex_colour",
    "load_script",
    "load_theme",
]
