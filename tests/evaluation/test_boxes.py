"""The joint box of two masks against scipy's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from liverseg_dist.evaluation.metrics.boxes import find_joint_box

SHAPE = (5, 6, 7)
POINTS = st.lists(st.tuples(*(st.integers(0, edge - 1) for edge in SHAPE)), max_size=4)


def make_mask(points: list[tuple[int, int, int]], value: int) -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    for point in points:
        mask[point] = value
    return mask


@given(POINTS, POINTS, st.integers(0, 3))
def test_box_is_scipys_with_a_margin_within_the_array(
    in_prediction: list[tuple[int, int, int]],
    in_truth: list[tuple[int, int, int]],
    margin: int,
) -> None:
    prediction, truth = make_mask(in_prediction, 1), make_mask(in_truth, 2)
    found = find_joint_box(prediction, truth, margin)
    joint = ((prediction > 0) | (truth > 0)).astype(int)
    if not joint.any():
        assert found is None
        return
    (tight,) = ndimage.find_objects(joint)
    expected = []
    for one, edge in zip(tight, SHAPE, strict=True):
        expected.append(slice(max(0, one.start - margin), min(edge, one.stop + margin)))
    assert found == tuple(expected)


def test_boolean_masks_are_accepted() -> None:
    mask = np.zeros(SHAPE, bool)
    mask[2, 3, 4] = True
    assert find_joint_box(mask, mask, 0) == (slice(2, 3), slice(3, 4), slice(4, 5))


def test_masks_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prediction has shape \(5, 6, 7\), truth \(5, 6, 8\)"):
        find_joint_box(np.zeros(SHAPE), np.zeros((5, 6, 8)))
