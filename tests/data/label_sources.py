"""Small data sets with other labels than those of LiTS."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.data.sources import write_nifti

SHAPE = (20, 32, 36)
"""z, y, x."""
BLOCK = 6
"""Edge of the block of each structure in voxels, in plane."""


def block_label(values: list[int], shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """A label with one block for each value, side by side."""
    label = np.zeros(shape, np.uint8)
    for number, value in enumerate(values):
        row, column = divmod(number, 5)
        y, x = 1 + row * (BLOCK + 1), 1 + column * (BLOCK + 1)
        label[4 + number % 3 : 15, y : y + BLOCK, x : x + BLOCK] = value
    return label


def ct_of(label: np.ndarray, seed: int) -> np.ndarray:
    """Air at the edges, a body of 40 HU, and 10 HU more for each label value."""
    rng = np.random.default_rng(seed)
    image = np.full(label.shape, -1000.0)
    image[:, 1:-1, 1:-1] = 40 + rng.normal(
        0, 5, (label.shape[0], label.shape[1] - 2, label.shape[2] - 2)
    )
    return (image + 3 * (label % 20)).astype(np.int16)


def write_dataset(
    folder: Path, labels: Mapping[str, Any] | None, masks: list[np.ndarray], **more: Any
) -> Path:
    """`case_0`, `case_1`, ... with the given label files and labels in dataset.json."""
    names = [f"case_{number}" for number in range(len(masks))]
    for number, (name, mask) in enumerate(zip(names, masks, strict=True)):
        write_nifti(folder / "imagesTr" / f"{name}.nii.gz", ct_of(mask, number))
        write_nifti(folder / "labelsTr" / f"{name}.nii.gz", mask)
    index: dict[str, Any] = {"name": folder.name, "channel_names": {"0": "CT"}, **more}
    index["training"] = [
        {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"} for name in names
    ]
    if labels is not None:
        index["labels"] = labels
    (folder / "dataset.json").write_text(json.dumps(index))
    return folder


def write_structure_case(
    folder: Path, case: str, masks: Mapping[str, np.ndarray], seed: int
) -> None:
    """One case with one file per structure."""
    first = next(iter(masks.values()))
    write_nifti(folder / case / "ct.nii.gz", ct_of(first.astype(np.uint8), seed))
    for name, mask in masks.items():
        write_nifti(folder / case / "segmentations" / f"{name}.nii.gz", mask.astype(np.uint8))
