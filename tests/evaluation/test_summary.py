"""A case's scores and their exact pooling."""

import json
import math
import random

import numpy as np
import pytest

from liverseg_dist.errors import UserError
from liverseg_dist.evaluation import aggregate_scores, score_case
from liverseg_dist.evaluation.metrics.bootstrap import (
    mean_interval,
    percentile_interval,
    ratio_interval,
    resample_indices,
)
from liverseg_dist.volume import Float3
from tests.evaluation.masks import SHAPE, SPACINGS, labels

STRUCTURE_KEYS = {
    "dice_per_case", "dice_global", "jaccard", "voe", "rvd", "assd_mm", "rmsd_mm", "mssd_mm", "hd95_mm", "nsd_1mm",
    "nsd_2mm",
}  # fmt: skip


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    scored = [score_case(f"case_{i}", labels(i), labels(i + 40), SPACINGS[i % 3]) for i in range(5)]
    empty = np.zeros(SHAPE, dtype=np.uint8)
    scored.append(score_case("case_no_prediction", empty, labels(5), SPACINGS[0]))
    scored.append(score_case("case_tumour_free", labels(6), np.minimum(labels(46), 1), SPACINGS[1]))
    scored.append(score_case("case_nothing_at_all", empty, empty, SPACINGS[2]))
    return scored


def test_schema(cases: list[dict]) -> None:
    summary = aggregate_scores(cases)
    assert (summary["schema"], summary["n_cases"]) == (2, 8)
    for structure in ("liver", "tumour"):
        assert summary[structure].keys() >= STRUCTURE_KEYS
    for name in ("iou_50", "iou_0"):
        assert summary["tumour"]["detection"][name].keys() >= {
            "precision",
            "recall",
            "tp",
            "fp",
            "fn",
        }
    assert summary["burden"].keys() >= {"rmse", "max_abs_error"}
    json.dumps(summary, allow_nan=False)


def test_figures_by_hand(cases: list[dict]) -> None:
    summary = aggregate_scores(cases)
    for structure in ("liver", "tumour"):
        scores = [case[structure] for case in cases]
        assert summary[structure]["dice_per_case"] == pytest.approx(
            np.mean([s["dice"] for s in scores]), rel=1e-14
        )
        shared = sum(s["intersection_voxels"] for s in scores)
        total = sum(s["prediction_voxels"] + s["truth_voxels"] for s in scores)
        assert summary[structure]["dice_global"] == 2 * shared / total
        distances = [s["hd95_mm"] for s in scores if s["hd95_mm"] is not None]
        assert summary[structure]["hd95_mm"] == pytest.approx(np.mean(distances), rel=1e-14)
        assert summary[structure]["n_defined"]["hd95_mm"] == len(distances) < 8
    found = summary["tumour"]["detection"]["iou_0"]
    for key in ("tp", "fp", "fn"):
        assert found[key] == sum(case["detection"]["iou_0"][key] for case in cases)
    assert found["recall"] == found["tp"] / (found["tp"] + found["fn"])
    assert (
        sum(part["lesions"] for part in found["recall_by_size"].values())
        == found["tp"] + found["fn"]
    )
    errors = [case["burden"]["error"] for case in cases if case["burden"]["error"] is not None]
    assert len(errors) == 7
    assert summary["burden"]["rmse"] == pytest.approx(
        math.sqrt(np.mean(np.square(errors))), rel=1e-14
    )
    assert summary["burden"]["max_abs_error"] == max(abs(error) for error in errors)
    pairs = [pair for case in cases for pair in case["detected_pairs"]]
    assert summary["tumour"]["detected_lesions"]["n"] == len(pairs)


def test_order_and_json_do_not_change_the_summary(cases: list[dict]) -> None:
    reference = json.dumps(aggregate_scores(cases))
    for seed in range(5):
        shuffled = json.loads(json.dumps(random.Random(seed).sample(cases, len(cases))))
        assert json.dumps(aggregate_scores(shuffled)) == reference


def test_no_cases() -> None:
    summary = aggregate_scores([])
    assert summary["n_cases"] == 0
    assert summary["liver"]["dice_per_case"] is None
    json.dumps(summary, allow_nan=False)


def test_duplicate_case_is_refused(cases: list[dict]) -> None:
    with pytest.raises(ValueError, match="twice"):
        aggregate_scores([cases[0], cases[0]])


def test_empty_case_is_perfect(cases: list[dict]) -> None:
    nothing = cases[-1]
    assert nothing["liver"]["dice"] == nothing["tumour"]["dice"] == 1.0
    assert nothing["liver"]["hd95_mm"] is None
    assert nothing["burden"] == {"truth": None, "prediction": 0.0, "error": None}


def test_crop_around_the_masks_does_not_change_scores() -> None:
    """Metrics do not depend on how much empty space surrounds the patient."""
    prediction, truth = (np.pad(labels(seed), 2) for seed in (1, 2))
    roomy = score_case("a", np.pad(prediction, 5), np.pad(truth, 5), SPACINGS[1])
    tight = score_case("a", prediction, truth, SPACINGS[1])
    for case in (roomy, tight):
        case.pop("shape_zyx")
        for lesion in case["lesions"]:
            lesion.pop("centre_zyx")
    assert roomy == tight


def test_lesion_centres_are_voxels_of_the_scan() -> None:
    truth = np.zeros((20, 20, 20), dtype=np.uint8)
    truth[3:15, 4:16, 5:17] = 1
    truth[10:13, 11:14, 12:15] = 2
    (lesion,) = score_case("a", np.zeros_like(truth), truth, (1.0, 1.0, 1.0))["lesions"]
    assert lesion["centre_zyx"] == [11.0, 12.0, 13.0]


def test_ignored_voxels_are_left_out_of_both() -> None:
    prediction, truth = labels(1), labels(2)
    truth[:5] = 255
    cut = score_case("a", prediction, truth, SPACINGS[0])
    expected = score_case(
        "a", np.where(truth == 255, 0, prediction), np.where(truth == 255, 0, truth), SPACINGS[0]
    )
    assert cut == expected


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        (np.zeros((2, 3, 4), np.uint8), np.zeros((2, 3, 5), np.uint8), "shape"),
        (
            np.full((2, 2, 2), 3, np.uint8),
            np.zeros((2, 2, 2), np.uint8),
            "the prediction has label 3",
        ),
        (
            np.zeros((2, 2, 2), np.uint8),
            np.full((2, 2, 2), -1, np.int16),
            "the truth has labels -1",
        ),
        (np.zeros((2, 2, 2), np.float32), np.zeros((2, 2, 2), np.uint8), "float32"),
        (np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8), "3D"),
    ],
)
def test_invalid_masks_are_refused_in_one_line(
    prediction: np.ndarray, truth: np.ndarray, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        score_case("case_7", prediction, truth, (1.0, 1.0, 1.0))
    assert str(caught.value).startswith("case_7: ")
    assert "\n" not in str(caught.value)


def test_integer_types_do_not_matter() -> None:
    prediction, truth = labels(1), labels(2)
    reference = score_case("a", prediction, truth, SPACINGS[0])
    assert (
        score_case("a", prediction.astype(np.int64), truth.astype(np.int16), SPACINGS[0])
        == reference
    )
    assert (
        score_case("a", np.asfortranarray(prediction), truth[::-1][::-1], SPACINGS[0]) == reference
    )


def test_bootstrap_intervals() -> None:
    values = np.random.default_rng(1).normal(10.0, 2.0, size=200)
    indices = resample_indices(200)
    low, high = mean_interval(values, indices) or (0.0, 0.0)
    standard_error = values.std() / math.sqrt(200)
    assert low == pytest.approx(
        values.mean() - 1.96 * standard_error, abs=0.1 * standard_error * 1.96
    )
    assert high == pytest.approx(
        values.mean() + 1.96 * standard_error, abs=0.1 * standard_error * 1.96
    )
    assert np.array_equal(indices, resample_indices(200))
    assert ratio_interval(np.full(200, 3), np.full(200, 4), indices) == [0.75, 0.75]
    assert mean_interval(np.full(3, np.nan), resample_indices(3)) is None
    assert percentile_interval(np.array([np.nan, 2.0])) == [2.0, 2.0]


def test_undefined_cases_do_not_affect_the_interval() -> None:
    values = np.array([1.0, np.nan, 1.0, np.nan])
    assert mean_interval(values, resample_indices(4)) == [1.0, 1.0]


@pytest.mark.real_mini
def test_reference_values_of_a_real_case(liver_28: tuple[np.ndarray, np.ndarray, Float3]) -> None:
    prediction, truth, spacing_mm = liver_28
    liver = score_case("liver_28", prediction, truth, spacing_mm)["liver"]
    assert liver["dice"] == pytest.approx(0.976587, abs=5e-7)
    assert liver["jaccard"] == pytest.approx(0.954245, abs=5e-7)
    assert liver["rvd"] == pytest.approx(-0.0061076, abs=5e-8)
    assert (liver["prediction_voxels"], liver["intersection_voxels"]) == (2_847_632, 2_789_505)
