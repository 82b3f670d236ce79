"""Lesion detection on hand-made cases; components against scipy."""

import math

import numpy as np
import pytest
from scipy import ndimage

from liverseg_dist.evaluation.metrics.lesions import (
    classify_size,
    count_detections,
    equivalent_diameter_mm,
    find_components,
    match_components,
    match_lesions,
    score_lesions,
)
from tests.evaluation.masks import blobs

MM = (1.0, 1.0, 1.0)


def line(*spans: tuple[int, int]) -> np.ndarray:
    """A mask along x, (1, 1, 60), filled in each span [start, stop)."""
    mask = np.zeros((1, 1, 60), dtype=np.uint8)
    for start, stop in spans:
        mask[0, 0, start:stop] = 1
    return mask


def counts(
    prediction: np.ndarray, truth: np.ndarray
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(tp, fp, fn) at IoU above 0.5 and above 0."""
    found = score_lesions(prediction, truth, MM)["detection"]
    strict, any_overlap = (
        (found[name]["tp"], found[name]["fp"], found[name]["fn"]) for name in ("iou_50", "iou_0")
    )
    return strict, any_overlap


@pytest.mark.parametrize(("connectivity", "rank"), [(6, 1), (18, 2), (26, 3)])
def test_components_match_scipy(connectivity: int, rank: int) -> None:
    mask = np.random.default_rng(0).random((12, 13, 14)) < 0.2
    structure = ndimage.generate_binary_structure(3, rank)
    reference, count = ndimage.label(mask, structure)
    found = find_components(mask, connectivity)
    assert found.count == count
    pairs = {
        (a, b)
        for a, b in zip(found.labels_zyx.ravel().tolist(), reference.ravel().tolist(), strict=True)
    }
    assert len(pairs) == count + 1  # one to one, background included
    for number in range(1, count + 1):
        own = found.labels_zyx == number
        assert found.voxels[number - 1] == own.sum()
        np.testing.assert_allclose(
            found.centres_zyx[number - 1], ndimage.center_of_mass(own), rtol=1e-5
        )


def test_pairs_count_the_voxels_of_their_lesions() -> None:
    prediction, truth = (find_components(blobs(seed, 0.15)) for seed in (1, 2))
    pairs = match_lesions(prediction, truth)
    assert pairs
    for pair in pairs:
        predicted, true = (
            np.isin(prediction.labels_zyx, pair.prediction),
            np.isin(truth.labels_zyx, pair.truth),
        )
        counts = pair.counts
        assert (counts.prediction, counts.truth) == (predicted.sum(), true.sum())
        assert counts.intersection == (predicted & true).sum()


def test_noise_is_counted_but_not_listed_in_full() -> None:
    prediction, truth = np.zeros((2, 20, 40, 40), dtype=np.uint8)
    prediction[::2, ::2, ::2] = 1  # 4000 lesions of one voxel
    truth[0, 0, 0] = truth[4, 4:6, 4] = 1
    scores = score_lesions(prediction, truth, MM)
    assert scores["detection"]["iou_0"] == {"tp": 2, "fp": 3998, "fn": 0}
    assert len(scores["lesions"]) == 2 + 2 + 500


def test_default_connectivity_matches_lits_scorer() -> None:
    corner = np.zeros((3, 3, 3), dtype=np.uint8)
    corner[0, 0, 0] = corner[1, 1, 1] = 1
    assert find_components(corner).count == 2
    assert find_components(corner, 26).count == 1


def test_one_to_one() -> None:
    assert counts(line((10, 20)), line((10, 20))) == ((1, 0, 0), (1, 0, 0))


def test_threshold_is_strict() -> None:
    """10 of 20 voxels shared: IoU is exactly 0.5, which is not above 0.5."""
    assert counts(line((10, 20)), line((10, 30))) == ((0, 1, 1), (1, 0, 0))
    assert counts(line((10, 21)), line((10, 30))) == ((1, 0, 0), (1, 0, 0))


def test_missed_and_false_positive_lesion() -> None:
    assert counts(line((40, 50)), line((10, 20))) == ((0, 1, 1), (0, 1, 1))


def test_tumour_free_truth() -> None:
    """The official scorer fails here; every predicted lesion is a false positive."""
    assert counts(line((1, 4), (10, 12)), line()) == ((0, 2, 0), (0, 2, 0))


def test_tumour_free_prediction() -> None:
    assert counts(line(), line((1, 4), (10, 12))) == ((0, 0, 2), (0, 0, 2))


def test_no_tumour_in_both_masks() -> None:
    assert counts(line(), line()) == ((0, 0, 0), (0, 0, 0))


def test_one_prediction_over_two_lesions_detects_both() -> None:
    """18 of 20 predicted voxels are true: the merged lesion has IoU 0.9 and counts twice."""
    assert counts(line((10, 30)), line((10, 19), (21, 30))) == ((2, 0, 0), (2, 0, 0))


def test_merging_does_not_reduce_false_positives_elsewhere() -> None:
    assert counts(line((10, 30), (50, 52)), line((10, 19), (21, 30))) == ((2, 1, 0), (2, 1, 0))


def test_a_lesion_found_in_three_pieces() -> None:
    """One true positive; the two extra pieces are false positives, as in the official scorer."""
    assert counts(line((10, 16), (17, 23), (24, 30)), line((10, 30))) == ((1, 2, 0), (1, 2, 0))


def test_a_prediction_goes_to_the_lesion_it_overlaps_most() -> None:
    """The small lesion is best covered by its own prediction, so the long prediction belongs to the big one only."""
    truth, prediction = line((10, 30), (40, 44)), line((10, 30), (40, 44))
    prediction[0, 0, 41:44] = 0
    assert counts(prediction, truth) == ((1, 1, 1), (2, 0, 0))


def test_correspondence_of_a_chain() -> None:
    """Prediction 0 covers lesions 0 and 1 best; prediction 1 overlaps lesion 1 a little and joins that pair."""
    shared = np.array([[8, 6, 0], [0, 2, 0]])
    (pair,) = match_components(shared, np.array([14, 5]), np.array([8, 9, 4]))
    assert (pair.truth, pair.prediction) == ((1, 2), (1, 2))
    assert (pair.counts.prediction, pair.counts.truth, pair.counts.intersection) == (19, 17, 16)
    assert count_detections([pair], 2, 3, 0.5) == {"tp": 2, "fp": 0, "fn": 1}


def test_order_of_lesions_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    shared = rng.integers(0, 40, size=(5, 6)) * (rng.random((5, 6)) < 0.4)
    sizes = shared.sum(axis=1) + 10, shared.sum(axis=0) + 15
    reference = count_detections(match_components(shared, *sizes), 5, 6, 0.2)
    for _ in range(5):
        rows, columns = rng.permutation(5), rng.permutation(6)
        pairs = match_components(shared[np.ix_(rows, columns)], sizes[0][rows], sizes[1][columns])
        assert count_detections(pairs, 5, 6, 0.2) == reference


def test_counts_add_up() -> None:
    for seed in range(6):
        prediction, truth = blobs(seed, 0.1), blobs(seed + 30, 0.1)
        scores = score_lesions(prediction, truth, MM)
        for found in scores["detection"].values():
            assert found["tp"] + found["fn"] == ndimage.label(truth)[1]
            assert 0 <= found["fp"] <= ndimage.label(prediction)[1]
        for name, found in scores["detection"].items():
            rows = [row for row in scores["lesions"] if row["side"] == "truth"]
            assert sum(row[f"detected_{name}"] for row in rows) == found["tp"]


def test_lesion_table() -> None:
    truth, prediction = np.zeros((2, 12, 12, 12), dtype=np.uint8)
    truth[2:6, 2:6, 2:6] = 1
    prediction[2:6, 2:6, 3:7] = 1
    prediction[9, 9, 9] = 1
    scores = score_lesions(prediction, truth, (2.0, 1.0, 1.0))
    true, found, alarm = scores["lesions"]
    assert (true["side"], true["voxels"], true["volume_ml"], true["match"]) == (
        "truth",
        64,
        0.128,
        [1],
    )
    assert true["iou"] == 48 / 80
    assert true["dice"] == 96 / 128
    assert true["centre_zyx"] == [3.5, 3.5, 3.5]
    assert (true["detected_iou_50"], true["detected_iou_0"]) == (True, True)
    assert (found["side"], found["match"]) == ("prediction", [1])
    assert (alarm["match"], alarm["iou"], alarm["detected_iou_0"]) == ([], 0.0, False)
    (pair,) = scores["detected_pairs"]
    assert (pair["truth"], pair["prediction"], pair["dice"]) == ([1], [1], 0.75)


def test_diameter_is_that_of_the_ball() -> None:
    assert equivalent_diameter_mm(4 / 3 * math.pi * 0.5**3) == pytest.approx(10.0)
    assert [classify_size(d) for d in (0.0, 9.99, 10.0, 19.99, 20.0, 300.0)] == [
        "under_10mm", "under_10mm", "10_to_20mm", "10_to_20mm", "over_20mm", "over_20mm",
    ]  # fmt: skip


def test_unknown_connectivity_is_refused() -> None:
    with pytest.raises(ValueError, match="connectivity 8"):
        find_components(line((1, 2)), 8)
