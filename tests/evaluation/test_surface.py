"""Surface metrics against DeepMind's surface-distance, MONAI, scipy and the published CHAOS definition."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import ndimage

from liverseg_dist.evaluation.metrics.surface import (
    DISTANCE_KEYS,
    encode_blocks,
    measure_border_distances,
    measure_surfel_distances,
    score_surface,
)
from liverseg_dist.evaluation.metrics.surfels import compute_surfel_areas_mm2
from liverseg_dist.volume import Float3
from tests.evaluation.masks import SPACINGS, blobs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import surface_distance
    from monai.metrics import (
        compute_average_surface_distance,
        compute_hausdorff_distance,
        compute_surface_dice,
    )
    from surface_distance import lookup_tables

ignore_old_scipy_names = pytest.mark.filterwarnings("ignore:Please:DeprecationWarning")
ignore_monais_own_deprecations = pytest.mark.filterwarnings("ignore:monai:FutureWarning")
PAIRS = [(seed, seed + 100) for seed in range(4)]


def as_batch(mask: np.ndarray) -> torch.Tensor:
    """(1, 2, z, y, x) one-hot for MONAI, away from the faces because MONAI treats those as empty space."""
    mask = np.pad(mask, 2)
    return torch.from_numpy(np.stack([~mask, mask])[None].astype(np.float32))


@pytest.mark.parametrize("spacing_mm", [*SPACINGS, (5.0, 0.31, 0.97)])
def test_surface_element_areas_match_deepmind(spacing_mm: Float3) -> None:
    reference = lookup_tables.create_table_neighbour_code_to_surface_area(spacing_mm)
    np.testing.assert_allclose(compute_surfel_areas_mm2(spacing_mm), reference, rtol=1e-12, atol=0)


def test_block_codes_match_deepmind() -> None:
    mask = blobs(3)
    padded = np.pad(mask.astype(np.uint8), ((0, 1), (0, 1), (0, 1)))
    reference = ndimage.correlate(
        padded, lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL, mode="constant", cval=0
    )
    np.testing.assert_array_equal(encode_blocks(mask.astype(np.uint8)), reference)


@ignore_old_scipy_names
@pytest.mark.parametrize("spacing_mm", SPACINGS)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_hd95_and_nsd_match_deepmind(first: int, second: int, spacing_mm: Float3) -> None:
    prediction, truth = blobs(first), blobs(second, 0.3)
    scores = score_surface(prediction, truth, spacing_mm)
    reference = surface_distance.compute_surface_distances(truth, prediction, spacing_mm)
    assert scores["hd95_mm"] == surface_distance.compute_robust_hausdorff(reference, 95)
    for tolerance in (1, 2):
        expected = surface_distance.compute_surface_dice_at_tolerance(reference, tolerance)
        assert scores[f"nsd_{tolerance}mm"] == pytest.approx(expected, rel=1e-12)


@ignore_monais_own_deprecations
@pytest.mark.parametrize("spacing_mm", SPACINGS)
def test_nsd_matches_monai_with_subvoxels(spacing_mm: Float3) -> None:
    prediction, truth = blobs(1), blobs(2)
    expected = compute_surface_dice(
        as_batch(prediction),
        as_batch(truth),
        class_thresholds=[2.0],
        spacing=spacing_mm,
        use_subvoxels=True,
    )
    assert score_surface(prediction, truth, spacing_mm)["nsd_2mm"] == pytest.approx(
        float(expected), rel=1e-5
    )


@pytest.mark.parametrize("spacing_mm", SPACINGS)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_assd_rmsd_mssd_match_chaos(first: int, second: int, spacing_mm: Float3) -> None:
    """CHAOS: border voxels by erosion with border_value=1, nearest border voxel of the other mask; here by EDT."""
    masks = [blobs(first), blobs(second, 0.3)]
    borders = [mask & ~ndimage.binary_erosion(mask, border_value=1) for mask in masks]
    maps = [ndimage.distance_transform_edt(~border, sampling=spacing_mm) for border in borders]
    distances = np.concatenate([maps[1][borders[0]], maps[0][borders[1]]])
    scores = score_surface(masks[0], masks[1], spacing_mm)
    assert scores["assd_mm"] == pytest.approx(distances.mean(), rel=1e-12)
    assert scores["rmsd_mm"] == pytest.approx(np.sqrt((distances**2).mean()), rel=1e-12)
    assert scores["mssd_mm"] == distances.max()


@ignore_monais_own_deprecations
def test_distances_match_monai_away_from_the_scan_faces() -> None:
    spacing_mm = (2.5, 0.7, 0.9)
    prediction, truth = np.pad(blobs(5), 1), np.pad(blobs(6), 1)
    scores = score_surface(prediction, truth, spacing_mm)
    batches = as_batch(prediction), as_batch(truth)
    largest = compute_hausdorff_distance(*batches, spacing=spacing_mm)
    there = compute_average_surface_distance(*batches, spacing=spacing_mm)
    back = compute_average_surface_distance(*batches[::-1], spacing=spacing_mm)
    distances = measure_border_distances(
        prediction.astype(np.uint8), truth.astype(np.uint8), spacing_mm
    )
    assert distances is not None
    assert scores["mssd_mm"] == pytest.approx(float(largest), rel=1e-6)
    assert distances.from_prediction_mm.mean() == pytest.approx(float(there), rel=1e-6)
    assert distances.from_truth_mm.mean() == pytest.approx(float(back), rel=1e-6)


@pytest.mark.parametrize("spacing_mm", SPACINGS)
def test_distances_of_far_points_are_exact(spacing_mm: Float3) -> None:
    """Two small objects in opposite corners: every distance comes from the tree, not from the places around a point."""
    prediction, truth = np.zeros((2, 40, 44, 48), dtype=np.uint8)
    prediction[2:5, 3:6, 1:4] = 1
    truth[33:37, 38:40, 41:46] = 1
    distances = measure_surfel_distances(prediction, truth, spacing_mm)
    codes = [encode_blocks(mask) for mask in (prediction, truth)]
    surfaces = [(code != 0) & (code != 255) for code in codes]
    expected = ndimage.distance_transform_edt(~surfaces[1], sampling=spacing_mm)[surfaces[0]]
    np.testing.assert_array_equal(distances.from_prediction_mm, expected)


def test_distances_of_noise_are_exact() -> None:
    """So many far points that a whole distance map is made."""
    spacing_mm = (2.0, 0.7, 0.7)
    prediction, truth = np.zeros((2, 30, 60, 60), dtype=np.uint8)
    prediction[:, :, 25:] = np.random.default_rng(0).random((30, 60, 35)) < 0.3
    truth[14:17, 20:24, 2:5] = 1
    distances = measure_surfel_distances(prediction, truth, spacing_mm)
    codes = [encode_blocks(mask) for mask in (prediction, truth)]
    surfaces = [(code != 0) & (code != 255) for code in codes]
    expected = ndimage.distance_transform_edt(~surfaces[1], sampling=spacing_mm)[surfaces[0]]
    np.testing.assert_array_equal(distances.from_prediction_mm, expected)


@pytest.mark.parametrize("spacing_mm", SPACINGS)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_closed_distances_count_beyond_the_scan_as_outside(
    first: int, second: int, spacing_mm: Float3
) -> None:
    """CHAOS's formula with border_value=0; the blobs reach the scan's faces."""
    masks = [blobs(first), blobs(second, 0.3)]
    borders = [mask & ~ndimage.binary_erosion(mask, border_value=0) for mask in masks]
    maps = [ndimage.distance_transform_edt(~border, sampling=spacing_mm) for border in borders]
    distances = np.concatenate([maps[1][borders[0]], maps[0][borders[1]]])
    scores = score_surface(masks[0], masks[1], spacing_mm)
    assert scores["assd_closed_mm"] == pytest.approx(distances.mean(), rel=1e-12)
    assert scores["rmsd_closed_mm"] == pytest.approx(np.sqrt((distances**2).mean()), rel=1e-12)
    assert scores["mssd_closed_mm"] == distances.max()


@ignore_old_scipy_names
def test_a_missing_end_slice_in_both_conventions() -> None:
    """A liver cut off by the scan's last slice, which the prediction lacks: open 30 mm or more, closed one slice."""
    truth = np.zeros((24, 32, 32), dtype=np.uint8)
    truth[4:, 4:28, 4:28] = 1
    prediction = truth.copy()
    prediction[-1] = 0
    spacing_mm = (3.0, 3.0, 3.0)
    scores = score_surface(prediction, truth, spacing_mm)
    reference = surface_distance.compute_surface_distances(truth > 0, prediction > 0, spacing_mm)
    assert scores["mssd_mm"] is not None
    assert scores["mssd_mm"] > 30  # from the middle of the false end face to the sides
    assert scores["mssd_closed_mm"] == 3.0
    assert scores["hd95_mm"] == surface_distance.compute_robust_hausdorff(reference, 95) == 3.0


def test_away_from_the_edge_both_conventions_agree() -> None:
    prediction, truth = np.pad(blobs(1), 2), np.pad(blobs(2), 2)
    scores = score_surface(prediction, truth, (1.0, 1.0, 1.0))
    for name in ("assd", "rmsd", "mssd"):
        assert scores[f"{name}_closed_mm"] == scores[f"{name}_mm"]


def test_known_distances_of_two_shifted_boxes() -> None:
    """A box of 10 mm moved by 3 mm along x: the moved faces are 3 mm apart, MSSD and HD95 are 3 mm."""
    prediction, truth = np.zeros((2, 30, 30, 30), dtype=np.uint8)
    truth[10:20, 10:20, 10:20] = 1
    prediction[10:20, 10:20, 13:23] = 1
    scores = score_surface(prediction, truth, (1.0, 1.0, 1.0))
    assert scores["mssd_mm"] == 3.0
    assert scores["hd95_mm"] == 3.0


def test_a_cut_at_the_scan_face_is_no_border() -> None:
    """A liver that leaves the scan at the top has no border voxels there (CHAOS's border_value=1)."""
    truth = np.zeros((10, 12, 12), dtype=np.uint8)
    truth[4:, 3:9, 3:9] = 1
    distances = measure_border_distances(truth, truth, (1.0, 1.0, 1.0))
    assert distances is not None
    side_voxels = 5 * (36 - 16)  # slices 5..9: the ring of a 6x6 square
    assert distances.from_truth_mm.size == 36 + side_voxels


@pytest.mark.parametrize("spacing_mm", SPACINGS)
def test_identical_masks_have_no_distance(spacing_mm: Float3) -> None:
    mask = blobs(7)
    assert score_surface(mask, mask, spacing_mm) == {
        "assd_mm": 0.0, "rmsd_mm": 0.0, "mssd_mm": 0.0, "hd95_mm": 0.0, "nsd_1mm": 1.0, "nsd_2mm": 1.0,
        "assd_closed_mm": 0.0, "rmsd_closed_mm": 0.0, "mssd_closed_mm": 0.0,
    }  # fmt: skip


def test_empty_masks() -> None:
    full, empty = blobs(8), np.zeros_like(blobs(8))
    undefined = dict.fromkeys(DISTANCE_KEYS)
    for prediction, truth, nsd in ((empty, empty, 1.0), (full, empty, 0.0), (empty, full, 0.0)):
        scores = score_surface(prediction, truth, (1.0, 1.0, 1.0))
        assert scores == undefined | {"nsd_1mm": nsd, "nsd_2mm": nsd}


def test_a_mask_that_fills_the_scan_has_no_border_voxel() -> None:
    full, part = np.ones((6, 6, 6), dtype=np.uint8), np.zeros((6, 6, 6), dtype=np.uint8)
    part[:3] = 1
    for prediction, truth in ((full, part), (part, full), (full, full)):
        scores = score_surface(prediction, truth, (1.0, 1.0, 1.0))
        assert scores["assd_mm"] is None
        assert scores["hd95_mm"] is not None  # surface elements close the mask at the scan's faces


def test_a_single_voxel() -> None:
    prediction, truth = np.zeros((2, 9, 9, 9), dtype=np.uint8)
    prediction[4, 4, 4] = truth[4, 4, 6] = 1
    scores = score_surface(prediction, truth, (3.0, 1.0, 0.5))
    assert scores["assd_mm"] == scores["rmsd_mm"] == scores["mssd_mm"] == 1.0
    assert math.isclose(scores["nsd_1mm"] or 0, 1.0)


@pytest.mark.real_mini
def test_reference_values_of_a_real_case(liver_28: tuple[np.ndarray, np.ndarray, Float3]) -> None:
    """Values computed with scipy and the surface-distance package on the whole scan."""
    prediction, truth, spacing_mm = liver_28
    scores = score_surface(prediction > 0, truth > 0, spacing_mm)
    assert scores["assd_mm"] == pytest.approx(0.694134, abs=1e-6)
    assert scores["mssd_mm"] == pytest.approx(12.611273, abs=1e-6)
    assert scores["hd95_mm"] == pytest.approx(1.964587, abs=1e-6)
    assert scores["nsd_1mm"] == pytest.approx(0.770297, abs=1e-6)
    assert scores["nsd_2mm"] == pytest.approx(0.955362, abs=1e-6)
