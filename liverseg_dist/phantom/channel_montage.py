"""A picture of a phantom set with any channels and structures (see `montage`)."""

from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from liverseg_dist.data.io.nifti import read_nifti
from liverseg_dist.phantom.channel_dataset import ChannelSet
from liverseg_dist.phantom.montage import (
    TILE_PX,
    TILES_PER_CHANNEL,
    arrange_rows,
    draw_case_row,
)
from liverseg_dist.volume import Grid, Volume


def draw_channel_montage(made: ChannelSet, most_cases: int) -> Image.Image:
    """Draw the first labelled cases of a set, two side by side if each has one channel."""
    plan = made.recipe.labels
    rows = []
    for number in range(min(made.cases, most_cases)):
        label_file = made.label_file(number)
        assert label_file is not None
        label = read_nifti(label_file, "label")
        # The tumours, if there are any, else the first structure.
        shown = [
            plan.values[name] for name in ("tumour", plan.structures[0]) if name in plan.values
        ]
        # A case can have no tumour although the plan labels tumours.
        value = next((value for value in shown if value in label.voxels), shown[-1])
        images = _read_channels(made, number)
        tiles = []
        for channel in made.recipe.channels:
            if channel in images:
                row = draw_case_row({channel: images[channel]}, label, value, plan.has_region)
            else:
                # A black tile in place of an absent channel keeps the columns aligned.
                row = np.zeros((TILE_PX, TILES_PER_CHANNEL * TILE_PX, 3), np.uint8)
            tiles.append(row)
        rows.append(np.concatenate(tiles, axis=1))
    return arrange_rows(rows, 2 if len(made.recipe.channels) == 1 else 1)


def _read_channels(made: ChannelSet, number: int) -> dict[str, Volume]:
    files = made.image_files(number)
    if made.layout != "msd4d":
        return {channel: read_nifti(file) for channel, file in files.items()}
    return {
        channel: _read_channel(file, index) for index, (channel, file) in enumerate(files.items())
    }


def _read_channel(file: Path, index: int) -> Volume:
    """Read one channel of a 4D file (x, y, z, channel)."""
    image = nib.Nifti1Image.from_filename(file)
    voxels = np.asarray(image.dataobj[..., index]).transpose(2, 1, 0)
    shape = (voxels.shape[0], voxels.shape[1], voxels.shape[2])
    return Volume(np.ascontiguousarray(voxels), Grid(shape, np.array(image.affine)))
