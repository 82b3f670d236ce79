"""Connected components of a structure, largest first, and where the scan cuts them."""

from collections.abc import Iterator
from dataclasses import dataclass

import cc3d
import numpy as np

CONNECTIVITIES = (6, 18, 26)
LITS_CONNECTIVITY = 6
"""Faces alone make neighbours, as the LiTS challenge counts lesions."""
Box = tuple[slice, slice, slice]
FACES = (("inferior", "superior"), ("posterior", "anterior"), ("left", "right"))
"""Sides of the array along z, y, x in canonical (RAS) orientation: lowest index, highest index."""
UNLABELLED = "unlabelled"
"""Neighbour of voxels with the ignore value: what lies there is not known."""


@dataclass(frozen=True)
class Component:
    """One connected component.

    Attributes:
        number: From 1, by descending volume.
        box: Bounding box in the array it was found in.
        mask_zyx: Boolean mask within `box`.
        voxels: Number of voxels.
    """

    number: int
    box: Box
    mask_zyx: np.ndarray
    voxels: int


def bounding_box(mask_zyx: np.ndarray, margin: int = 0) -> Box | None:
    """Box of the voxels that are set, grown by `margin` voxels inside the array; None where none is
    set."""
    slices = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        index = np.flatnonzero(mask_zyx.any(axis=others))
        if index.size == 0:
            return None
        low, high = (
            max(0, int(index[0]) - margin),
            min(mask_zyx.shape[axis], int(index[-1]) + 1 + margin),
        )
        slices.append(slice(low, high))
    return slices[0], slices[1], slices[2]


def shift_box(box: Box, by: Box) -> Box:
    """A box found inside the box `by`, in the coordinates of the array that `by` was cut from."""
    z, y, x = (
        slice(own.start + at.start, own.stop + at.start) for own, at in zip(box, by, strict=True)
    )
    return z, y, x


def find_components(
    mask_zyx: np.ndarray, connectivity: int = LITS_CONNECTIVITY
) -> Iterator[Component]:
    """The components of a mask by descending volume; of equal ones, that which comes first in the
    array.

    Raises:
        ValueError: `connectivity` is not 6 (faces), 18 (and edges) or 26 (and corners).
    """
    if connectivity not in CONNECTIVITIES:
        raise ValueError(
            f"connectivity {connectivity}: 6 (faces), 18 (and edges) or 26 (and corners)"
        )
    around = bounding_box(mask_zyx)
    if around is None:
        return
    # A lesion fills a small part of a scan: labelling its box alone saves time and memory.
    inner = np.ascontiguousarray(mask_zyx[around], dtype=bool)
    labels, count = cc3d.connected_components(  # type: ignore[call-overload]
        inner, connectivity=connectivity, return_N=True
    )
    statistics = cc3d.statistics(labels, no_slice_conversion=True)
    # Entry 0 is the background. Signed integers, because unsigned sizes cannot be negated below.
    sizes = statistics["voxel_counts"][1 : count + 1].astype(np.int64)
    corners = statistics["bounding_boxes"][1 : count + 1].astype(np.int64)
    # A stable sort keeps the array order of equal sizes, so numbers are reproducible.
    for number, index in enumerate(np.argsort(-sizes, kind="stable").tolist(), start=1):
        # The last index of cc3d is inclusive, the stop of a slice is not.
        low, high = corners[index, 0::2], corners[index, 1::2] + 1
        z, y, x = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        # Other components can reach into the box, so the label decides.
        mask = labels[z, y, x] == index + 1
        yield Component(number, shift_box((z, y, x), around), mask, int(sizes[index]))


def cut_faces(
    mask_zyx: np.ndarray, box: Box, label_zyx: np.ndarray, ignore: int | None
) -> tuple[str, ...]:
    """Sides on which a mask ends because the scan does: names of `FACES`, and `UNLABELLED`.

    Args:
        mask_zyx: Boolean mask within `box`.
        box: Where the mask lies in the scan.
        label_zyx: All labels of the scan, in canonical orientation.
        ignore: The label value of voxels without annotation, or None.
    """
    faces = []
    for axis, (low_name, high_name) in enumerate(FACES):
        if box[axis].start == 0 and mask_zyx.take(0, axis=axis).any():
            faces.append(low_name)
        if box[axis].stop == label_zyx.shape[axis] and mask_zyx.take(-1, axis=axis).any():
            faces.append(high_name)
    if ignore is not None and _touches_value(mask_zyx, box, label_zyx, ignore):
        faces.append(UNLABELLED)
    return tuple(faces)


def _touches_value(mask_zyx: np.ndarray, box: Box, label_zyx: np.ndarray, value: int) -> bool:
    """Whether a face neighbour of the mask has this label."""
    grown_z, grown_y, grown_x = (
        # One voxel more on each side: face neighbours of the mask can lie outside its box.
        slice(max(0, axis.start - 1), min(size, axis.stop + 1))
        for axis, size in zip(box, label_zyx.shape, strict=True)
    )
    is_value = label_zyx[grown_z, grown_y, grown_x] == value
    if not is_value.any():
        return False
    mask = np.zeros(is_value.shape, dtype=bool)
    inner = [
        slice(own.start - grown.start, own.stop - grown.start)
        for own, grown in zip(box, (grown_z, grown_y, grown_x), strict=True)
    ]
    mask[tuple(inner)] = mask_zyx
    for axis in range(3):
        a, b = np.moveaxis(mask, axis, 0), np.moveaxis(is_value, axis, 0)
        if (a[1:] & b[:-1]).any() or (a[:-1] & b[1:]).any():
            return True
    return False
