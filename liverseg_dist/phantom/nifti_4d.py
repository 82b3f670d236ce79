"""Writes several registered channels into one NIfTI file, as in the Decathlon's Task01."""

from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip

from liverseg_dist.files import atomic_write
from liverseg_dist.volume import Volume

GZIP_LEVEL = 1


def write_channels(file: Path, channels: list[Volume]) -> None:
    """Write int16 channels on one grid as an array (x, y, z, channel).

    Equal voxels give equal bytes, and the file is complete or absent.
    """
    grid = channels[0].grid
    for channel in channels:
        if channel.grid != grid:
            raise ValueError("the channels of one file need one grid")
    voxels_zyxc = np.stack([channel.voxels for channel in channels], axis=-1)
    image = nib.Nifti1Image(voxels_zyxc.transpose(2, 1, 0, 3), grid.affine)
    image.set_qform(grid.affine, code=1)
    image.set_sform(grid.affine, code=1)
    image.header.set_xyzt_units("mm")
    with (
        atomic_write(file) as raw,
        # No name and no time in the gzip header.
        igzip.IGzipFile(
            filename="", mode="wb", compresslevel=GZIP_LEVEL, fileobj=raw, mtime=0
        ) as stream,
    ):
        stream.write(image.to_bytes())
