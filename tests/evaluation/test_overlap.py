"""Overlap and burden against MONAI, scipy and hand-made counts."""

import warnings

import numpy as np
import pytest
import torch
from scipy.spatial.distance import dice as scipy_dice
from scipy.spatial.distance import jaccard as scipy_jaccard

from liverseg_dist.evaluation.metrics.burden import compute_burden, score_burden
from liverseg_dist.evaluation.metrics.overlap import (
    OverlapCounts,
    count_confusion,
    count_structures,
)
from liverseg_dist.labels import LITS_SCHEME
from tests.evaluation.masks import labels

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from monai.metrics import compute_dice, compute_iou


@pytest.mark.parametrize("seed", range(4))
def test_dice_and_jaccard_match_scipy_and_monai(seed: int) -> None:
    prediction, truth = labels(seed), labels(seed + 50)
    counts = count_structures(count_confusion(prediction, truth, 3), LITS_SCHEME)
    for structure, masks in (
        ("liver", (prediction > 0, truth > 0)),
        ("tumour", (prediction == 2, truth == 2)),
    ):
        own = counts[structure]
        flat = [mask.ravel() for mask in masks]
        batches = [torch.from_numpy(mask[None, None].astype(np.float32)) for mask in masks]
        assert own.dice() == pytest.approx(1 - scipy_dice(*flat), rel=1e-12)
        assert own.jaccard() == pytest.approx(1 - scipy_jaccard(*flat), rel=1e-12)
        assert own.dice() == pytest.approx(float(compute_dice(*batches)), rel=1e-6)
        assert own.jaccard() == pytest.approx(float(compute_iou(*batches)), rel=1e-6)
        assert own.voe() == 1 - own.jaccard()
        assert own.rvd() == pytest.approx(masks[0].sum() / masks[1].sum() - 1, rel=1e-12)


def test_liver_includes_its_tumours() -> None:
    prediction, truth = np.zeros((2, 1, 1, 4), dtype=np.uint8)
    prediction[0, 0] = [1, 1, 2, 0]
    truth[0, 0] = [1, 2, 2, 2]
    counts = count_structures(count_confusion(prediction, truth, 3), LITS_SCHEME)
    assert counts["liver"] == OverlapCounts(prediction=3, truth=4, intersection=3)
    assert counts["tumour"] == OverlapCounts(prediction=1, truth=3, intersection=1)


@pytest.mark.parametrize(
    ("counts", "dice", "jaccard", "voe", "rvd"),
    [
        (OverlapCounts(0, 0, 0), 1.0, 1.0, 0.0, 0.0),
        (OverlapCounts(5, 0, 0), 0.0, 0.0, 1.0, None),
        (OverlapCounts(0, 5, 0), 0.0, 0.0, 1.0, -1.0),
        (OverlapCounts(2, 4, 2), 2 / 3, 0.5, 0.5, -0.5),
    ],
)
def test_empty_mask_rules(
    counts: OverlapCounts, dice: float, jaccard: float, voe: float, rvd: float | None
) -> None:
    assert counts.scores() == {"dice": dice, "jaccard": jaccard, "voe": voe, "rvd": rvd}


def test_burden() -> None:
    assert compute_burden(200, 50) == 0.25
    assert compute_burden(0, 0) is None
    liver, tumour = OverlapCounts(200, 100, 100), OverlapCounts(20, 30, 10)
    assert score_burden(liver, tumour) == {"truth": 0.3, "prediction": 0.1, "error": 0.1 - 0.3}
    without_prediction = score_burden(OverlapCounts(0, 100, 0), OverlapCounts(0, 30, 0))
    assert without_prediction == {"truth": 0.3, "prediction": 0.0, "error": -0.3}
    assert score_burden(OverlapCounts(9, 0, 0), OverlapCounts(3, 0, 0))["error"] is None
