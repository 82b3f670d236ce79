"""Collect voxels as int16 as long as that is lossless, then as float32: used by all scan readers."""

import numpy as np


class ImageBuffer:
    """Collects values as int16 as long as that is lossless, then as float32.

    One array of the final size is allocated; the system provides its pages when they are written.
    """

    def __init__(self, count: int) -> None:
        self.voxels: np.ndarray = np.empty(count, dtype=np.int16)
        self.position = 0

    def append(self, values: np.ndarray) -> None:
        part = slice(self.position, self.position + values.size)
        self.position = part.stop
        if self.voxels.dtype == np.int16:
            integers = _convert_to_integers(values, np.int16)
            if integers is not None:
                self.voxels[part] = integers
                return
            # All int16 values are exact in float32.
            wider = np.empty(self.voxels.size, dtype=np.float32)
            wider[: part.start] = self.voxels[: part.start]
            self.voxels = wider
        # Values beyond float32 become infinite, which the audit reports.
        with np.errstate(over="ignore"):
            self.voxels[part] = values


def _convert_to_integers(values: np.ndarray, dtype: type[np.int16]) -> np.ndarray | None:
    """The values as integers, or None if that would change a value."""
    limits = np.iinfo(dtype)
    # `not` of the whole: comparisons with NaN are false, so NaN is rejected here.
    if not (values.min() >= limits.min and values.max() <= limits.max):
        return None
    integers = values.astype(dtype)
    if values.dtype.kind == "f" and not (integers == values).all():
        return None
    return integers
