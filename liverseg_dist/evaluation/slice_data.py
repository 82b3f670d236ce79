"""Voxels of a case for the report's viewer: CT and both masks, packed as text.

The page draws every slice of all three planes from one volume, with a window that the reader sets.
The CT is therefore stored as intensities, not as pictures. One byte a voxel is enough: `HU_OF_CODE`
has steps of 2 HU in soft tissue, where a narrow window shows them, and coarse steps in air and
bone.
"""

import base64
import gzip
import math
import re
from typing import Any

import numpy as np
from PIL import Image

from liverseg_dist.volume import Float3

MAX_SIDE = 288
"""Largest size along y or x, voxels; a wider box is resampled. No slice along z is left out."""
MAX_VOXELS = 12_000_000
"""Largest number of voxels: about 5 MB packed. A larger box is resampled further in y and x."""
LITS_CODES = 3
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")
MAX_PACKED = 64 << 20


def _hu_table() -> np.ndarray:
    """HU of each of the 256 codes, ascending."""
    air = np.linspace(-1024, -152, 28)
    soft_tissue = np.arange(-120, 280, 2)
    bone = np.linspace(312, 1400, 28)
    return np.concatenate([air, soft_tissue, bone]).round().astype(np.int16)


HU_OF_CODE = _hu_table()
SCALED_RANGE = (-100.0, 260.0)
"""Values of `HU_OF_CODE` that the window of an image without a unit is mapped to."""


def pack_slices(
    prediction_zyx: np.ndarray,
    truth_zyx: np.ndarray,
    image_zyx: np.ndarray | None,
    spacing_mm: Float3,
    num_codes: int = LITS_CODES,
    window: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Pack the voxels of one case for the page.

    Args:
        prediction_zyx: Codes below `num_codes` in display orientation (head to feet, front to
            back, right to left).
        truth_zyx: Codes of the same shape.
        image_zyx: Scan of the same shape, or None.
        spacing_mm: Voxel size z, y, x.
        num_codes: Number of codes; the square is at most 256.
        window: Intensities of a scan that is not CT, which take the places of the soft tissue of
            `HU_OF_CODE`; None: the scan is CT in HU.

    Returns:
        A JSON-able dict: `shape` and `spacing_mm` of the stored volume, `stored_of` (voxels of the
        box along each axis), `labels` (truth + num_codes * prediction), `ct` (codes, or None) and `hu` (HU
        of the codes, or None). Volumes are base64 of gzip of bytes; each byte is the difference to
        the one before it along x, which compresses better.
    """
    shape = _stored_shape(truth_zyx.shape)
    sizes = zip(shape, truth_zyx.shape, strict=True)
    sampled = np.ix_(*[_nearest_indices(stored, size) for stored, size in sizes])
    labels = truth_zyx[sampled] + num_codes * prediction_zyx[sampled]
    ct = None
    if image_zyx is not None and window is not None:
        image_zyx = _scale_to_hu(image_zyx, window)
    if image_zyx is not None:
        ct = _compress(_encode_hu(_resample_planes(image_zyx, shape)))
    return {
        "shape": list(shape),
        "stored_of": list(truth_zyx.shape),
        "spacing_mm": [
            round(s * n / m, 6) for s, n, m in zip(spacing_mm, truth_zyx.shape, shape, strict=True)
        ],
        "labels": _compress(labels.astype(np.uint8)),
        "ct": ct,
        "hu": None if ct is None else HU_OF_CODE.tolist(),
        "is_ct": window is None,
    }


def _scale_to_hu(intensities: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Intensities without a unit on the scale of `SCALED_RANGE`, which has fine steps."""
    low, high = window
    first, last = SCALED_RANGE
    share = (intensities.astype(np.float32) - low) / (high - low)
    return np.clip(first + share * (last - first), -1024, 1400)


def unpack_volume(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """The uint8 volume of `labels` or `ct`, as the page's script decodes it."""
    content = gzip.decompress(base64.b64decode(text))
    differences = np.frombuffer(content, dtype=np.uint8).reshape(shape)
    return np.cumsum(differences, axis=2, dtype=np.uint8)


def check_slices(packed: dict[str, Any]) -> bool:
    """Whether a value is a result of `pack_slices`.

    It becomes part of a web page, so nothing else may pass.
    """
    try:
        shape, stored_of, spacing_mm = packed["shape"], packed["stored_of"], packed["spacing_mm"]
        if not len(shape) == len(stored_of) == len(spacing_mm) == 3:
            return False
        for number in (*shape, *stored_of):
            if type(number) is not int or not 0 < number < 1 << 16:
                return False
        for mm in spacing_mm:
            if not isinstance(mm, float) or not 0 < mm < 1e4:
                return False
        has_ct = packed["ct"] is not None
        for text in (packed["labels"], packed["ct"]) if has_ct else (packed["labels"],):
            if len(text) >= MAX_PACKED or _BASE64.fullmatch(text) is None:
                return False
        if not isinstance(packed["is_ct"], bool):
            return False
        return packed["hu"] == (HU_OF_CODE.tolist() if has_ct else None)
    except (TypeError, KeyError):
        return False


def _stored_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    z, y, x = shape
    shrink = max(1.0, y / MAX_SIDE, x / MAX_SIDE, math.sqrt(z * y * x / MAX_VOXELS))
    return z, max(1, math.floor(y / shrink)), max(1, math.floor(x / shrink))


def _nearest_indices(stored: int, size: int) -> np.ndarray:
    return ((np.arange(stored) + 0.5) * size / stored).astype(int)


def _resample_planes(image_zyx: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Resample each axial slice to the stored size; voxels are averaged where it shrinks."""
    if image_zyx.shape == shape:
        return image_zyx
    size = (shape[2], shape[1])
    planes = []
    for plane in image_zyx:
        image = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))
        planes.append(np.asarray(image.resize(size, Image.Resampling.BILINEAR)))
    return np.stack(planes)


def _encode_hu(hu: np.ndarray) -> np.ndarray:
    """The code with the nearest HU; values beyond the table take its ends."""
    # A table over all HU values in range: one look-up a voxel instead of a search.
    bounds = (HU_OF_CODE[1:].astype(np.float32) + HU_OF_CODE[:-1]) / 2
    lowest, highest = int(HU_OF_CODE[0]), int(HU_OF_CODE[-1])
    table = np.searchsorted(bounds, np.arange(lowest, highest + 1)).astype(np.uint8)
    rounded = np.clip(np.nan_to_num(np.round(hu)), lowest, highest).astype(np.int32)
    return table[rounded - lowest]


def _compress(volume: np.ndarray) -> str:
    # uint8 differences wrap around, and so do the sums that decode them.
    differences = np.diff(volume, axis=2, prepend=np.uint8(0))
    # Without a time stamp the same volume always gives the same text.
    compressed = gzip.compress(differences.tobytes(), compresslevel=6, mtime=0)
    return base64.b64encode(compressed).decode("ascii")
