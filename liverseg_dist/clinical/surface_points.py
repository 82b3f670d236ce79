"""Points on a mask's surface, between the centres of voxels inside and of their neighbours outside.

The true surface crosses the line between two such centres somewhere. The midpoint has no error on
average; a point nearer to the inside voxel makes up for the error of a maximum over many points
(`diameters` has the figures).
"""

import numpy as np

MIDPOINT = 0.5


def face_points(mask: np.ndarray, offset: float = MIDPOINT) -> np.ndarray:
    """A point for every face between a voxel of the mask and one outside.

    The array's own border counts as outside, so that a cut mask has a surface there too.

    Args:
        mask: Boolean array of any number of dimensions.
        offset: Distance from the inside voxel's centre towards the outside one, in voxels; 0.5 is
            on the face.

    Returns:
        Points (n, d) in voxel indices.
    """
    points = []
    for axis in range(mask.ndim):
        padding = [(0, 0)] * mask.ndim
        padding[axis] = (1, 1)
        change = np.diff(np.pad(mask, padding).view(np.int8), axis=axis)
        # Change k lies between voxels k - 1 and k: +1 where the mask begins with k, -1 where it ends with k - 1.
        begins = np.argwhere(change == 1).astype(np.float64)
        ends = np.argwhere(change == -1).astype(np.float64)
        begins[:, axis] -= offset
        ends[:, axis] += offset - 1
        points += [begins, ends]
    return np.concatenate(points)


def inner_face_points(mask: np.ndarray) -> np.ndarray:
    """`face_points` on the faces, without those on the array's border: there the scan ends, not the
    structure."""
    points = face_points(mask)
    last = np.array(mask.shape) - 0.5
    on_border = ((points == -0.5) | (points == last)).any(axis=1)
    return points[~on_border]
