"""Post-processing against scipy's components on simple and random masks."""

import numpy as np
import pytest
from scipy import ndimage

from liverseg_dist.config import InferenceConfig
from liverseg_dist.inference.postprocess import (
    STEPS,
    fill_holes,
    find_foreground_box,
    keep_largest_liver,
    postprocess_mask,
    relabel_small_tumours,
    remove_distant_tumours,
    trim_tumours_outside_liver,
)
from liverseg_dist.inference.postprocess_search import OPERATIONS
from liverseg_dist.volume import Float3

FACES = ndimage.generate_binary_structure(3, 1)
CORNERS = ndimage.generate_binary_structure(3, 3)


def make_noise_mask(seed: int, shape: tuple[int, int, int] = (20, 24, 22)) -> np.ndarray:
    """Blobs of liver with single voxels of tumour."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal(shape), 1.5)
    mask = (field > np.quantile(field, 0.85)).astype(np.uint8)
    mask[(mask == 1) & (rng.random(shape) < 0.2)] = 2
    return mask


@pytest.mark.parametrize("seed", range(4))
def test_only_the_largest_liver_and_its_tumours_are_kept(seed: int) -> None:
    mask = make_noise_mask(seed)
    components, count = ndimage.label(mask > 0, CORNERS)
    assert count > 3
    largest = 1 + np.argmax(np.bincount(components.ravel())[1:])
    expected = np.where(components == largest, mask, 0)
    keep_largest_liver(mask)
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("min_voxels", [1, 2, 3, 1000])
def test_small_tumours_become_liver(seed: int, min_voxels: int) -> None:
    mask = make_noise_mask(seed)
    components, _ = ndimage.label(mask == 2, FACES)
    sizes = np.bincount(components.ravel())
    expected = np.where((mask == 2) & (sizes[components] < min_voxels), 1, mask)
    relabel_small_tumours(mask, min_voxels)
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize("seed", range(4))
def test_the_same_holes_as_in_scipy_are_filled(seed: int) -> None:
    mask = make_noise_mask(seed)
    mask[mask == 0] = (
        np.random.default_rng(seed).random((mask == 0).sum()) < 0.55
    )  # a sponge has holes
    before = mask.copy()
    filled = ndimage.binary_fill_holes(mask > 0)
    assert filled.sum() > (mask > 0).sum()
    fill_holes(mask)
    assert np.array_equal(mask > 0, filled)
    assert np.array_equal(mask[before > 0], before[before > 0])


def test_a_hole_inside_a_tumour_is_tumour() -> None:
    mask = np.zeros((9, 9, 18), np.uint8)
    mask[1:8, 1:8, 1:17] = 1
    mask[2:7, 2:7, 2:7] = 2
    mask[4, 4, 4] = mask[4, 4, 12] = 0
    fill_holes(mask)
    assert (mask[4, 4, 4], mask[4, 4, 12]) == (2, 1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("reach_mm", [2.5, 6.0, 12.0])
def test_distant_tumours_are_removed(seed: int, reach_mm: float) -> None:
    spacing_mm = (2.5, 1.0, 1.5)
    rng = np.random.default_rng(seed)
    mask = (ndimage.gaussian_filter(rng.standard_normal((20, 40, 40)), 2) > 0.12).astype(
        np.uint8
    ) * 2
    mask[:, :, :12] = ndimage.gaussian_filter(rng.standard_normal((20, 40, 12)), 2) > 0
    distance_mm = ndimage.distance_transform_edt(mask != 1, sampling=spacing_mm)
    tumours, count = ndimage.label(mask == 2, FACES)
    far = [n for n in range(1, count + 1) if distance_mm[tumours == n].min() > reach_mm]
    assert 0 < len(far) < count
    expected = np.where(np.isin(tumours, far), 0, mask)
    remove_distant_tumours(mask, spacing_mm, reach_mm)
    assert np.array_equal(mask, expected)


def test_with_a_reach_near_tumours_without_contact_stay() -> None:
    mask = np.zeros((10, 10, 60), np.uint8)
    mask[2:8, 2:8, 2:20] = 1
    mask[4:6, 4:6, 24:26] = 2  # 5 mm away from the large liver
    mask[4:6, 4:6, 40:48] = 1
    mask[4:6, 4:6, 48:50] = 2  # touches the small one only
    for reach_mm, tumour_voxels in ((None, 0), (4.0, 0), (5.0, 8)):
        now = mask.copy()
        postprocess_mask(
            now, (1.0, 1.0, 1.0), InferenceConfig(largest_component=True, tumour_reach_mm=reach_mm)
        )
        assert (now == 1).sum() == 6 * 6 * 18
        assert (now == 2).sum() == tumour_voxels


def make_ball(
    shape: tuple[int, int, int], centre: tuple[float, ...], radius_mm: float, spacing_mm: Float3
) -> np.ndarray:
    positions = np.stack(np.indices(shape), axis=-1) * spacing_mm
    return np.linalg.norm(positions - np.asarray(centre), axis=-1) <= radius_mm


@pytest.mark.parametrize("reach_mm", [0.0, 4.0, 8.0])
def test_tumours_at_the_edge_keep_the_part_inside_and_near_the_liver(reach_mm: float) -> None:
    spacing_mm, shape = (2.0, 1.0, 1.0), (40, 80, 90)
    liver = make_ball(shape, (40.0, 40.0, 35.0), 30.0, spacing_mm)
    deep = make_ball(
        shape, (40.0, 40.0, 25.0), 15.0, spacing_mm
    )  # its middle is 15 mm from any tissue
    edge = make_ball(
        shape, (40.0, 40.0, 60.0), 16.0, spacing_mm
    )  # sticks out by 11 mm, and lies in a bay of tissue
    mask = liver.astype(np.uint8)
    mask[deep | edge] = 2
    trim_tumours_outside_liver(mask, spacing_mm, reach_mm)
    assert (mask[deep] == 2).all()
    distance_mm = ndimage.distance_transform_edt(~liver, sampling=spacing_mm)
    sticking_out = edge & ~liver
    allowed_mm = max(reach_mm, 2.0)
    assert not mask[
        sticking_out & (distance_mm > allowed_mm)
    ].any()  # nothing of it further out than asked for
    assert (mask == 1).sum() == (liver & ~deep & ~edge).sum()
    tissue_mm = ndimage.distance_transform_edt(mask != 1, sampling=spacing_mm)
    assert (mask[edge & (tissue_mm <= allowed_mm)] == 2).all()
    assert 0 < (mask[edge] == 2).sum() < edge.sum()


@pytest.mark.parametrize("seed", range(3))
def test_trimmed_voxels_are_those_of_a_distance_map(seed: int) -> None:
    mask, spacing_mm = make_noise_mask(seed), (2.5, 1.0, 1.5)
    tissue = mask == 1
    inside = tissue.copy()
    for axis in range(3):
        inside |= np.stack(
            [ndimage.binary_fill_holes(plane) for plane in np.moveaxis(tissue, axis, 0)], axis=axis
        )
    mask[
        (
            ndimage.gaussian_filter(np.random.default_rng(seed + 9).standard_normal(mask.shape), 2)
            > 0.1
        )
        & ~inside
    ] = 2
    distance_mm = ndimage.distance_transform_edt(~inside, sampling=spacing_mm)
    expected = np.where((mask == 2) & (distance_mm > 4.0), 0, mask)
    assert (expected != mask).any()
    postprocess_mask(mask, spacing_mm, InferenceConfig(tumour_cut_mm=4.0))
    assert np.array_equal(mask, expected)


def test_without_liver_all_tumours_are_removed() -> None:
    for remove in (remove_distant_tumours, trim_tumours_outside_liver):
        mask = np.full((3, 3, 3), 2, np.uint8)
        remove(mask, (1.0, 1.0, 1.0), 100.0)
        assert not mask.any()


def test_minimum_tumour_volume_is_in_ml() -> None:
    mask = np.zeros((5, 10, 10), np.uint8)
    mask[1:4, 1:9, 1:9] = 1
    mask[2, 2, 2:6] = 2  # 4 voxels
    mask[2, 6, 2:5] = 2  # 3 voxels
    before = mask.copy()
    postprocess_mask(mask, spacing_mm=(1.0, 2.0, 5.0), config=InferenceConfig(min_tumour_ml=0.03))
    assert np.array_equal(mask, before)
    postprocess_mask(mask, spacing_mm=(1.0, 2.0, 5.0), config=InferenceConfig(min_tumour_ml=0.031))
    assert (mask == 2).sum() == 4
    assert (mask > 0).sum() == (before > 0).sum()


def test_default_settings_change_nothing() -> None:
    mask = make_noise_mask(0)
    before = mask.copy()
    postprocess_mask(mask, (1.0, 1.0, 1.0), InferenceConfig())
    assert np.array_equal(mask, before)


@pytest.mark.parametrize("config", [InferenceConfig(largest_component=True, min_tumour_ml=1.0)])
def test_empty_and_view_masks(config: InferenceConfig) -> None:
    empty = np.zeros((4, 5, 6), np.uint8)
    postprocess_mask(empty, (1.0, 1.0, 1.0), config)
    assert not empty.any()
    mask = make_noise_mask(1)
    view = mask.copy()[::-1].transpose(
        2, 0, 1
    )  # a view, as a mask in the file's own orientation is
    postprocess_mask(view, (1.0, 2.0, 1.0), config)
    postprocess_mask(mask, (2.0, 1.0, 1.0), config)
    assert np.array_equal(view, mask[::-1].transpose(2, 0, 1))


def test_foreground_box() -> None:
    mask = np.zeros((6, 7, 8), np.uint8)
    assert find_foreground_box(mask) is None
    mask[2, 3, 4] = mask[4, 1, 7] = 1
    assert find_foreground_box(mask) == (slice(2, 5), slice(1, 4), slice(4, 8))


def test_every_operation_of_the_search_is_a_step_in_the_same_order() -> None:
    # The predictor applies the threshold when it assigns labels; all else is a step.
    assert ["tumour_threshold", *STEPS] == list(OPERATIONS)
