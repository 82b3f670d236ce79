"""Post-processing against scipy's components on simple and random masks."""

import numpy as np
import pytest
from scipy import ndimage

from liverseg_dist.config import InferenceConfig
from liverseg_dist.errors import UserError
from liverseg_dist.inference.postprocess import (
    STEPS,
    fill_holes,
    find_foreground_box,
    keep_largest_component,
    postprocess_mask,
    relabel_small_components,
    remove_distant_lesions,
    trim_lesions_outside_organ,
)
from liverseg_dist.inference.postprocess_operations import OPTIONS, list_operations
from liverseg_dist.labels import LITS_SCHEME, LabelScheme, Structure
from liverseg_dist.volume import Float3

FACES = ndimage.generate_binary_structure(3, 1)
CORNERS = ndimage.generate_binary_structure(3, 3)
ORGAN, LESION = LITS_SCHEME.structures
TWO_ORGANS = LabelScheme(
    (
        (0, "background"),
        (1, "liver tissue"),
        (2, "tumour"),
        (3, "cyst"),
        (4, "kidney tissue"),
        (5, "mass"),
        (6, "spleen"),
    ),
    (
        Structure("liver", (1, 2, 3)),
        Structure("tumour", (2,), "lesion", "liver"),
        Structure("cyst", (3,), "lesion", "liver"),
        Structure("kidney", (4, 5)),
        Structure("mass", (5,), "lesion", "kidney"),
        Structure("spleen", (6,)),
    ),
)
"""Two organs with lesions, one of them with two kinds, and an organ without."""


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
    keep_largest_component(mask, ORGAN, LITS_SCHEME)
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("min_voxels", [1, 2, 3, 1000])
def test_small_tumours_become_liver(seed: int, min_voxels: int) -> None:
    mask = make_noise_mask(seed)
    components, _ = ndimage.label(mask == 2, FACES)
    sizes = np.bincount(components.ravel())
    expected = np.where((mask == 2) & (sizes[components] < min_voxels), 1, mask)
    relabel_small_components(mask, min_voxels, LESION, LITS_SCHEME)
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
    fill_holes(mask, ORGAN, LITS_SCHEME)
    assert np.array_equal(mask > 0, filled)
    assert np.array_equal(mask[before > 0], before[before > 0])


def test_a_hole_inside_a_tumour_is_tumour() -> None:
    mask = np.zeros((9, 9, 18), np.uint8)
    mask[1:8, 1:8, 1:17] = 1
    mask[2:7, 2:7, 2:7] = 2
    mask[4, 4, 4] = mask[4, 4, 12] = 0
    fill_holes(mask, ORGAN, LITS_SCHEME)
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
    remove_distant_lesions(mask, spacing_mm, reach_mm, LESION, LITS_SCHEME)
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
            now, (1.0, 1.0, 1.0), InferenceConfig(largest_component=True, reach_mm=reach_mm)
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
    trim_lesions_outside_organ(mask, spacing_mm, reach_mm, LESION, LITS_SCHEME)
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
    postprocess_mask(mask, spacing_mm, InferenceConfig(cut_mm=4.0))
    assert np.array_equal(mask, expected)


def test_without_liver_all_tumours_are_removed() -> None:
    for remove in (remove_distant_lesions, trim_lesions_outside_organ):
        mask = np.full((3, 3, 3), 2, np.uint8)
        remove(mask, (1.0, 1.0, 1.0), 100.0, LESION, LITS_SCHEME)
        assert not mask.any()


def test_minimum_tumour_volume_is_in_ml() -> None:
    mask = np.zeros((5, 10, 10), np.uint8)
    mask[1:4, 1:9, 1:9] = 1
    mask[2, 2, 2:6] = 2  # 4 voxels
    mask[2, 6, 2:5] = 2  # 3 voxels
    before = mask.copy()
    postprocess_mask(mask, spacing_mm=(1.0, 2.0, 5.0), config=InferenceConfig(min_volume_ml=0.03))
    assert np.array_equal(mask, before)
    postprocess_mask(mask, spacing_mm=(1.0, 2.0, 5.0), config=InferenceConfig(min_volume_ml=0.031))
    assert (mask == 2).sum() == 4
    assert (mask > 0).sum() == (before > 0).sum()


def test_default_settings_change_nothing() -> None:
    mask = make_noise_mask(0)
    before = mask.copy()
    postprocess_mask(mask, (1.0, 1.0, 1.0), InferenceConfig())
    assert np.array_equal(mask, before)


@pytest.mark.parametrize("config", [InferenceConfig(largest_component=True, min_volume_ml=1.0)])
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
    assert ["lesion_threshold", *STEPS] == list(OPTIONS)
    former = ["tumour_threshold", "largest_component", "fill_holes", "tumour_reach_mm"]
    assert list(list_operations(LITS_SCHEME)) == [*former, "tumour_cut_mm", "min_tumour_ml"]
    names = list(list_operations(TWO_ORGANS))
    assert names[:5] == [
        "lesion_threshold.tumour",
        "lesion_threshold.cyst",
        "lesion_threshold.mass",
        "largest_component.liver",
        "largest_component.kidney",
    ]
    organs_only = LabelScheme(((0, "background"), (1, "a"), (2, "b")), (
        Structure("a", (1,)), Structure("b", (2,))
    ))  # fmt: skip
    assert "largest_component.b" in list_operations(organs_only)
    assert not any("reach" in name for name in list_operations(organs_only))


def make_two_organs() -> np.ndarray:
    """Liver and kidney, each with a smaller second part, lesions of three kinds, and a spleen."""
    mask = np.zeros((12, 24, 60), np.uint8)
    mask[2:10, 2:22, 2:20] = 1
    mask[2:5, 2:5, 22:24] = 1
    mask[3:6, 4:7, 4:7] = 2
    mask[3, 12, 12] = 2
    mask[3:6, 10:13, 6:9] = 3
    mask[2:10, 4:12, 26:36] = 4
    mask[2:5, 16:19, 26:29] = 4
    mask[4:7, 6:9, 28:31] = 5
    mask[2:10, 4:12, 40:50] = 6
    mask[2:4, 16:18, 44:46] = 6
    return mask


def test_each_organ_has_its_own_largest_component() -> None:
    mask = make_two_organs()
    before = mask.copy()
    # true: the organs that contain lesions; the spleen has none.
    postprocess_mask(mask, (1.0, 1.0, 1.0), InferenceConfig(largest_component=True), TWO_ORGANS)
    assert not mask[2:5, 2:5, 22:24].any()
    assert not mask[2:5, 16:19, 26:29].any()
    assert (mask == 6).sum() == (before == 6).sum()
    kept = ((mask >= 1) & (mask <= 5)).sum()
    assert kept == 8 * 20 * 18 + 8 * 8 * 10
    named = before.copy()
    config = InferenceConfig(largest_component=("spleen",))
    postprocess_mask(named, (1.0, 1.0, 1.0), config, TWO_ORGANS)
    assert (named == 6).sum() == 8 * 8 * 10
    assert np.array_equal(named[before != 6], before[before != 6])


def test_volume_limits_are_those_of_the_named_structure() -> None:
    mask = make_two_organs()
    before = mask.copy()
    config = InferenceConfig(min_volume_ml={"tumour": 0.01, "spleen": 0.1})
    postprocess_mask(mask, (1.0, 1.0, 1.0), config, TWO_ORGANS)
    assert mask[3, 12, 12] == 1, "a small lesion becomes tissue of its organ"
    assert (mask == 2).sum() == 27
    assert (mask == 3).sum() == 27
    assert not mask[2:4, 16:18, 44:46].any(), "a small part of an organ becomes background"
    everywhere = before.copy()
    postprocess_mask(everywhere, (1.0, 1.0, 1.0), InferenceConfig(min_volume_ml=0.1), TWO_ORGANS)
    assert not np.isin(everywhere, (2, 3, 5)).any()
    assert (everywhere == 4).sum() == np.isin(before, (4, 5)).sum()
    assert (everywhere == 6).sum() == (before == 6).sum()


def test_lesions_are_measured_against_tissue_of_their_own_organ() -> None:
    mask = make_two_organs()
    mask[5, 8, 37] = 2  # beside the kidney, far from the liver
    mask[5, 8, 38] = 3  # touches that tumour, which is no tissue
    mask[5, 8, 51] = 5
    before = mask.copy()
    config = InferenceConfig(reach_mm={"tumour": 5.0, "cyst": 5.0})
    postprocess_mask(mask, (1.0, 1.0, 1.0), config, TWO_ORGANS)
    assert mask[5, 8, 37] == 0
    assert mask[5, 8, 38] == 0
    assert mask[5, 8, 51] == 5
    assert (mask != before).sum() == 2
    trimmed = before.copy()
    postprocess_mask(trimmed, (1.0, 1.0, 1.0), InferenceConfig(cut_mm=3.0), TWO_ORGANS)
    changed = np.argwhere(trimmed != before).tolist()
    assert changed == [[5, 8, 37], [5, 8, 38], [5, 8, 51]]


def test_holes_between_two_organs_stay() -> None:
    mask = np.zeros((7, 7, 14), np.uint8)
    mask[1:6, 1:6, 1:7] = 1
    mask[1:6, 1:6, 7:13] = 4
    mask[3, 3, 3] = 0  # enclosed by the liver
    mask[3, 3, 10] = 0  # enclosed by the kidney
    mask[3, 3, 6:8] = 0  # between them
    postprocess_mask(mask, (1.0, 1.0, 1.0), InferenceConfig(fill_holes=True), TWO_ORGANS)
    assert (mask[3, 3, 3], mask[3, 3, 10]) == (1, 4)
    assert not mask[3, 3, 6:8].any()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"largest_component": ("pancreas",)}, "pancreas"),
        ({"min_volume_ml": {"pancreas": 1.0}}, "pancreas"),
        ({"reach_mm": {"spleen": 1.0}}, "spleen"),
        ({"lesion_threshold": {"liver": 0.3}}, "liver"),
    ],
)
def test_settings_for_other_structures_are_refused_by_name(settings: dict, named: str) -> None:
    with pytest.raises(UserError, match=f"inference.{next(iter(settings))}.*{named}"):
        postprocess_mask(
            make_two_organs(), (1.0, 1.0, 1.0), InferenceConfig(**settings), TWO_ORGANS
        )
