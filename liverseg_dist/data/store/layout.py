"""Names, versions and array parameters of the store format, for its writer, reader and verifier.

    STORE/zarr.json                root group; its attribute `liverseg` describes the data set
    STORE/cases/<id>/image         int16 (C, 64, Y, X), RAS; one shard, a crc32c after every chunk
    STORE/cases/<id>/label         uint8 (64, Y, X); 255 is padding
    STORE/cases/<id>/source_label  uint8 (z, y, x) on the scan's own grid, in its file's axis order
    STORE/cases/<id>/foreground    int16 (n, 5): class, lesion number, z, y, x of sampled voxels
    STORE/loading.index            shard indices and foreground of all cases (`loading.loading_index`)
    STORE/SHA256SUMS               of every file, for `sha256sum -c` and `liverseg verify STORE`
    STORE/audit.html               every scan with its picture and findings
    STORE/.liverseg/               state of the conversion; readers never need it

Arrays are z, y, x. The group of a case has OME-Zarr 0.5 metadata and an attribute `liverseg` of its
own. `data/README.md` documents the format for users.
"""

import math
from collections.abc import Sequence
from typing import Any

from zarr.codecs import BloscCodec, Crc32cCodec

from liverseg_dist.volume import Grid, Index3

SCHEMA = 2
FIRST_SCHEMA = 1
"""Stores of one channel of CT with the labels of LiTS; their images are (64, Y, X)."""
IMAGE_DIMS, LABEL_DIMS = 4, 3
ATTRIBUTE = "liverseg"
CASES = "cases"
PRIVATE_DIR = ".liverseg"
"""Folder for the state of the conversion."""
CHECKSUM_FILE = "SHA256SUMS"
"""Checksum of every file of the store, in the format of `sha256sum`."""
INDEX_FILE = "loading.index"
"""What the loader must know of every case, in one file; a store may lack it."""
TRAIN_ONLY = "train_only"
"""Entry of `splits`: cases labelled by a run, which are in no fold and no test set."""
FILL = {"image": -32768, "label": 254, "source_label": 254, "foreground": -1}
"""Zarr returns the fill value for a missing file, without an error. Every chunk is written and none
of these values can occur in one, so a missing file is recognised; 0 would look like background."""
ARRAYS = tuple(FILL)
DTYPES = {"image": "int16", "label": "uint8", "source_label": "uint8", "foreground": "int16"}
IMAGE_CHUNK = (1, 64, 16, 64)
LABEL_CHUNK: Index3 = (64, 32, 64)
"""Fastest for random 64 x 128 x 128 patches of CT (`tools/bench/loader.py`): smaller chunks decode
fewer unused bytes, larger chunks need fewer calls."""
SOURCE_LABEL_CHUNK: Index3 = (32, 128, 128)
MAX_VOXELS = 2**30
"""The same limit as for a scan's file (`nifti_header`)."""
MAX_PADDING = 512
"""Voxels by which a chunk may exceed its array along an axis."""
_BLOCK_BYTES = 16384
"""Size of Blosc's blocks within a chunk: they are unshuffled in the core's first cache."""


def has_plausible_shape(shape: Sequence[int], *chunks: Sequence[int]) -> bool:
    """Whether the size in an array's metadata can be true, so that memory may be allocated for it.

    Args:
        shape: Shape of the array.
        chunks: Shapes of its chunks and shards, which may be little larger than the array.
    """
    if not all(n >= 0 for n in shape) or math.prod(shape) > MAX_VOXELS:
        return False
    for chunk in chunks:
        if len(chunk) != len(shape):
            return False
        for chunk_length, length in zip(chunk, shape, strict=True):
            if not min(1, length) <= chunk_length <= length + MAX_PADDING:
                return False
    return True


def shard_shape(shape: tuple[int, ...], chunk: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the single shard that holds a whole array.

    A case has four array files of any size, because cluster file systems limit the number of files.
    """
    return tuple(max(1, -(-n // c)) * c for n, c in zip(shape, chunk, strict=True))


def make_compressors(itemsize: int) -> list[Any]:
    """Codecs of a chunk: lz4hc for 2-byte voxels (decodes 4 GB/s on a core), lz4 else; crc32c."""
    if itemsize == 2:
        voxels = BloscCodec(
            cname="lz4hc", clevel=5, shuffle="shuffle", typesize=2, blocksize=_BLOCK_BYTES
        )
        return [voxels, Crc32cCodec()]
    return [BloscCodec(cname="lz4", clevel=5, shuffle="noshuffle", typesize=1), Crc32cCodec()]


def ome_metadata(grid: Grid, name: str) -> dict[str, Any]:
    """OME-Zarr 0.5 `multiscales` with one level; axes c, z, y, x, scale in mm.

    The translation places the slabs of a scan relative to each other. OME-Zarr 0.5 has no rotation:
    an oblique scan is shown with straight axes. Source: https://ngff.openmicroscopy.org/0.5/.
    """
    axes: list[dict[str, Any]] = [{"name": "c", "type": "channel"}]
    axes += [{"name": axis, "type": "space", "unit": "millimeter"} for axis in "zyx"]
    origin_zyx = grid.affine[:3, 3][::-1].tolist()
    transforms: list[dict[str, Any]] = [
        {"type": "scale", "scale": [1.0, *grid.spacing_mm]},
        {"type": "translation", "translation": [0.0, *origin_zyx]},
    ]
    datasets = [{"path": "image", "coordinateTransformations": transforms}]
    return {"version": "0.5", "multiscales": [{"name": name, "axes": axes, "datasets": datasets}]}
