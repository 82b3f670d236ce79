"""Cutting masks down to where something is: every metric works on the joint bounding box, not on the whole scan."""

import numpy as np

Box = tuple[slice, slice, slice]


def find_joint_box(
    prediction_zyx: np.ndarray, truth_zyx: np.ndarray, margin: int = 1
) -> Box | None:
    """The box of voxels that are non-zero in either mask, grown by `margin` but not beyond the array; None when empty.

    With a margin of 1 a face of the box lies on the array's own face only where the array really ends there, so boxes
    may be cut from boxes.
    """
    if prediction_zyx.shape != truth_zyx.shape:
        raise ValueError(f"prediction has shape {prediction_zyx.shape}, truth {truth_zyx.shape}")
    occupied_z = [bool(p.any() or t.any()) for p, t in zip(prediction_zyx, truth_zyx, strict=True)]
    if not any(occupied_z):
        return None
    z = _span(np.array(occupied_z), margin)
    plane = np.bitwise_or.reduce(prediction_zyx[z], axis=0) | np.bitwise_or.reduce(
        truth_zyx[z], axis=0
    )
    return z, _span(plane.any(axis=1), margin), _span(plane.any(axis=0), margin)


def _span(occupied: np.ndarray, margin: int) -> slice:
    index = np.flatnonzero(occupied)
    return slice(max(0, int(index[0]) - margin), min(occupied.size, int(index[-1]) + 1 + margin))
