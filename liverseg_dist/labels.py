"""Label values of Task03_Liver and LiTS, and the structures that are scored.

The structure `liver` is the organ with its tumours (label 1 or 2), as LiTS scores it.
"""

import numpy as np

BACKGROUND = 0
LIVER = 1
TUMOUR = 2
IGNORE = 255
"""Padding without a class; losses and metrics exclude these voxels."""

CLASS_NAMES = ("background", "liver", "tumour")
NUM_CLASSES = len(CLASS_NAMES)
STRUCTURES = ("liver", "tumour")


def structure_mask(label_zyx: np.ndarray, structure: str) -> np.ndarray:
    """Boolean mask of a scored structure: `liver` is label 1 or 2, `tumour` is label 2.

    Raises:
        ValueError: Another structure.
    """
    if structure == "liver":
        # A tumour is a part of the liver.
        return (label_zyx == LIVER) | (label_zyx == TUMOUR)
    if structure == "tumour":
        return label_zyx == TUMOUR
    raise ValueError(f"unknown structure {structure!r}; one of {', '.join(STRUCTURES)}")
