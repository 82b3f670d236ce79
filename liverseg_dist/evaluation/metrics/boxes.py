"""Bounding boxes of masks: every metric works on the joint box of both masks, not on the scan."""

import numpy as np

Box = tuple[slice, slice, slice]


def find_joint_box(
    prediction_zyx: np.ndarray, truth_zyx: np.ndarray, margin: int = 1
) -> Box | None:
    """Find the box of the voxels that are non-zero in either mask.

    With a margin of 1 a face of the box coincides with a face of the array only where the array
    ends next to the mask. Cutting to a box therefore never makes an edge of the scan, and boxes may
    be cut from boxes.

    Args:
        prediction_zyx: Integer or boolean mask.
        truth_zyx: Mask of the same shape.
        margin: Voxels added on each side, within the array.

    Returns:
        Slices z, y, x; None where both masks are empty.

    Raises:
        ValueError: The shapes differ.
    """
    if prediction_zyx.shape != truth_zyx.shape:
        raise ValueError(f"prediction has shape {prediction_zyx.shape}, truth {truth_zyx.shape}")
    # Slice by slice first: the planes of the other axes are then reduced over occupied slices only.
    occupied_z = np.zeros(len(truth_zyx), dtype=bool)
    for z, (prediction_yx, truth_yx) in enumerate(zip(prediction_zyx, truth_zyx, strict=True)):
        occupied_z[z] = prediction_yx.any() or truth_yx.any()
    if not occupied_z.any():
        return None
    slices_z = _find_span(occupied_z, margin)
    projection_yx = np.bitwise_or.reduce(prediction_zyx[slices_z], axis=0)
    projection_yx = projection_yx | np.bitwise_or.reduce(truth_zyx[slices_z], axis=0)
    slices_y = _find_span(projection_yx.any(axis=1), margin)
    return slices_z, slices_y, _find_span(projection_yx.any(axis=0), margin)


def _find_span(occupied: np.ndarray, margin: int) -> slice:
    index = np.flatnonzero(occupied)
    return slice(max(0, int(index[0]) - margin), min(occupied.size, int(index[-1]) + 1 + margin))
