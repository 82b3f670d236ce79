"""The store's names and versions, in one place for its writer, reader and verifier.

    STORE/zarr.json                  root group; attribute `liverseg`: settings, fingerprint, splits, audit, cases
    STORE/cases/<id>/image           int16 HU (64, Y, X), RAS; one shard, crc32c behind every chunk
    STORE/cases/<id>/label           uint8 (64, Y, X); 255 is padding
    STORE/cases/<id>/source_label    uint8 on the scan's own grid, as its file has it (z, y, x)
    STORE/cases/<id>/foreground      int16 (n, 5): class, tumour number, z, y, x of sampled voxels
    STORE/SHA256SUMS                 of every file: `sha256sum -c SHA256SUMS`, or `liverseg verify STORE`
    STORE/audit.html                 every scan with its picture and findings
    STORE/.liverseg/                 what conversion remembers between runs; readers never need it

Arrays are z, y, x. A case's group carries OME-Zarr 0.5 metadata and its own attribute `liverseg`.
"""

import math
from collections.abc import Sequence
from typing import Any

from zarr.codecs import BloscCodec, Crc32cCodec

from liverseg_dist.volume import Grid, Index3

SCHEMA = 1
ATTRIBUTE = "liverseg"
CASES = "cases"
TRAIN_ONLY = "train_only"
"""Entry of `splits`: cases that a run labelled, which stand in no fold and no test set; absent without such cases."""
FILL = {"image": -32768, "label": 254, "source_label": 254, "foreground": -1}
"""Every chunk is written, so these never occur. Zarr reads a missing file as its fill value, without a word: a value
that cannot be a voxel's tells, where 0 would pass for background."""
ARRAYS = tuple(FILL)
DTYPES = {"image": "int16", "label": "uint8", "source_label": "uint8", "foreground": "int16"}
IMAGE_CHUNK: Index3 = (64, 16, 64)
LABEL_CHUNK: Index3 = (64, 32, 64)
"""Measured for random 64 x 128 x 128 patches of CT: fewer bytes decoded in vain against fewer calls."""
SOURCE_LABEL_CHUNK: Index3 = (32, 128, 128)
MOST_VOXELS = 2**30
"""As many as a scan's file may have (`nifti_header`)."""
MOST_PADDING = 512
_BLOCK_BYTES = 16384
"""Blosc's own pieces of a chunk: they are put together in the core's first cache."""


def has_plausible_shape(shape: Sequence[int], *chunks: Sequence[int]) -> bool:
    """Whether an array's metadata may be acted on: of the size of a scan, in chunks (or shards) not much larger."""
    if not all(n >= 0 for n in shape) or math.prod(shape) > MOST_VOXELS:
        return False
    return all(
        len(chunk) == len(shape)
        and all(min(1, n) <= c <= n + MOST_PADDING for c, n in zip(chunk, shape, strict=True))
        for chunk in chunks
    )


def shard_shape(shape: tuple[int, ...], chunk: tuple[int, ...]) -> tuple[int, ...]:
    """One shard for the whole array: a case is four files, whatever its size (cluster file systems count inodes)."""
    return tuple(max(1, -(-n // c)) * c for n, c in zip(shape, chunk, strict=True))


def make_compressors(itemsize: int) -> list[Any]:
    """lz4hc for voxels (decodes at 4 GB/s a core), then a checksum."""
    if itemsize == 2:
        voxels = BloscCodec(
            cname="lz4hc", clevel=5, shuffle="shuffle", typesize=2, blocksize=_BLOCK_BYTES
        )
        return [voxels, Crc32cCodec()]
    return [BloscCodec(cname="lz4", clevel=5, shuffle="noshuffle", typesize=1), Crc32cCodec()]


def ome_metadata(grid: Grid, name: str) -> dict[str, Any]:
    """OME-Zarr 0.5 `multiscales` of one level (https://ngff.openmicroscopy.org/0.5/): axes z, y, x, scale in mm.

    The translation puts slabs of a scan where they belong; axes of oblique scans are shown as if they were straight.
    """
    axes = [{"name": axis, "type": "space", "unit": "millimeter"} for axis in "zyx"]
    origin_zyx = grid.affine[:3, 3][::-1].tolist()
    transforms: list[dict[str, Any]] = [
        {"type": "scale", "scale": list(grid.spacing_mm)},
        {"type": "translation", "translation": origin_zyx},
    ]
    datasets = [{"path": "image", "coordinateTransformations": transforms}]
    return {"version": "0.5", "multiscales": [{"name": name, "axes": axes, "datasets": datasets}]}
