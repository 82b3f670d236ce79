"""Colours of labels in the pictures of the audit and of `liverseg preview`, so that both have one legend."""

from liverseg_dist.labels import LIVER, TUMOUR

LABEL_COLOURS = {LIVER: (255, 190, 60), TUMOUR: (240, 60, 60)}
PADDING_COLOUR = (44, 52, 74)
"""Where a slab is padded."""
LEGEND = (
    ("liver", LABEL_COLOURS[LIVER]),
    ("tumour", LABEL_COLOURS[TUMOUR]),
    ("padding", PADDING_COLOUR),
)
