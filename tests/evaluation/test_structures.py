"""Scores of any label scheme: several organs, several kinds of lesions, partly annotated cases."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage

from liverseg_dist.errors import UserError
from liverseg_dist.evaluation.case_scores import (
    find_burden,
    find_lesion_scores,
    list_lesion_structures,
    list_scored,
)
from liverseg_dist.evaluation.metrics.case import score_case
from liverseg_dist.evaluation.report.csv_tables import write_cases_csv, write_lesions_csv
from liverseg_dist.evaluation.report.tensorboard import collect_headline_figures
from liverseg_dist.evaluation.report.terminal_summary import format_summary
from liverseg_dist.evaluation.summary import aggregate_scores
from liverseg_dist.label_scheme import scheme_from_labels
from liverseg_dist.labels import LITS_SCHEME, LabelScheme, Structure

SPACING_MM = (2.0, 1.0, 1.5)
FIVE = scheme_from_labels(
    {"background": 0, "liver": [1, 2], "liver_tumour": 2, "kidney": [3, 4], "kidney_cyst": 4}
)
SIXTEEN = scheme_from_labels({str(value): f"organ_{value}" for value in range(1, 17)})
ONE = scheme_from_labels({"background": 0, "spleen": 1})


def random_labels(labels: LabelScheme, seed: int) -> np.ndarray:
    """Smooth random regions of every class."""
    random = np.random.default_rng(seed)
    classes = max(value for value, _ in labels.values if value != labels.ignore) + 1
    fields = ndimage.gaussian_filter(random.normal(size=(classes, 12, 30, 28)), (0, 2, 3, 3))
    return fields.argmax(axis=0).astype(np.uint8)


def dice_of(prediction: np.ndarray, truth: np.ndarray) -> float:
    return 2 * float((prediction & truth).sum()) / float(prediction.sum() + truth.sum())


@pytest.mark.parametrize("labels", [ONE, FIVE, SIXTEEN], ids=["one", "five", "sixteen"])
def test_each_structure_is_scored_as_its_own_mask(labels: LabelScheme) -> None:
    prediction, truth = random_labels(labels, 0), random_labels(labels, 1)
    case = score_case("a", prediction, truth, SPACING_MM, labels=labels)
    assert list_scored(case) == labels.structure_names
    for structure in labels.structures:
        masks = [np.isin(mask, structure.values) for mask in (prediction, truth)]
        assert case[structure.name]["dice"] == pytest.approx(dice_of(*masks), abs=1e-12)
        as_organ = score_case("a", masks[0], masks[1], SPACING_MM, labels=ONE)["spleen"]
        for name in ("hd95_mm", "assd_mm", "nsd_2mm", "volume_error_ml"):
            assert case[structure.name][name] == as_organ[name]


def test_lesions_and_burden_belong_to_their_structure() -> None:
    prediction, truth = random_labels(FIVE, 2), random_labels(FIVE, 3)
    case = score_case("a", prediction, truth, SPACING_MM, labels=FIVE)
    assert list_lesion_structures([case]) == ("liver_tumour", "kidney_cyst")
    assert find_lesion_scores(case, "liver") is None
    for lesion, organ in (("liver_tumour", "liver"), ("kidney_cyst", "kidney")):
        scores = find_lesion_scores(case, lesion)
        assert scores is not None
        mask = np.isin(truth, FIVE.structure(lesion).values)
        true_lesions = [entry for entry in scores["lesions"] if entry["side"] == "truth"]
        assert len(true_lesions) == ndimage.label(mask)[1]
        burden = find_burden(case, lesion)
        assert burden is not None
        share = mask.sum() / np.isin(truth, FIVE.structure(organ).values).sum()
        assert burden["truth"] == pytest.approx(float(share))


def test_a_tumour_without_an_organ_around_it_has_no_burden() -> None:
    """The names are those of LiTS, but the form of its results has a burden in every case."""
    apart = LabelScheme(
        ((0, "background"), (1, "liver"), (2, "tumour")),
        (Structure("liver", (1,)), Structure("tumour", (2,), "lesion")),
    )
    masks = random_labels(apart, 2), random_labels(apart, 3)
    case = score_case("a", *masks, SPACING_MM, labels=apart)
    assert find_burden(case, "tumour") is None
    assert "burden" not in aggregate_scores([case])["tumour"]
    scores = find_lesion_scores(case, "tumour")
    assert scores is not None
    assert scores["lesions"]


def test_structures_that_were_not_annotated_are_left_out() -> None:
    cases = []
    for number, annotated in enumerate((None, ["kidney", "kidney_cyst"], ["liver"])):
        masks = random_labels(FIVE, 10 + number), random_labels(FIVE, 20 + number)
        cases.append(score_case(f"c{number}", *masks, SPACING_MM, labels=FIVE, annotated=annotated))
    assert [list_scored(case) for case in cases[1:]] == [("kidney", "kidney_cyst"), ("liver",)]
    summary = aggregate_scores(cases)
    assert summary["structures"] == list(FIVE.structure_names)
    mean = (cases[0]["liver"]["dice"] + cases[2]["liver"]["dice"]) / 2
    assert summary["liver"]["dice_per_case"] == pytest.approx(mean, abs=1e-12)
    assert summary["liver"]["n_annotated"] == 2
    assert summary["liver_tumour"]["n_defined"]["dice_per_case"] == 1
    assert "burden" not in summary
    assert summary["kidney_cyst"]["burden"]["n_defined"] == 2
    found = find_lesion_scores(cases[1], "kidney_cyst")
    first = find_lesion_scores(cases[0], "kidney_cyst")
    assert found is not None
    assert first is not None
    tp = found["detection"]["iou_0"]["tp"] + first["detection"]["iou_0"]["tp"]
    assert summary["kidney_cyst"]["detection"]["iou_0"]["tp"] == tp


def test_the_order_of_cases_changes_no_bit() -> None:
    cases = []
    for number in range(4):
        masks = random_labels(FIVE, number), random_labels(FIVE, 40 + number)
        cases.append(score_case(f"c{number}", *masks, SPACING_MM, labels=FIVE))
    assert aggregate_scores(cases) == aggregate_scores(cases[::-1])


def test_every_output_names_the_structures(tmp_path) -> None:
    masks = random_labels(FIVE, 5), random_labels(FIVE, 6)
    cases = [score_case("a", *masks, SPACING_MM, labels=FIVE)]
    summary = aggregate_scores(cases)
    write_cases_csv(tmp_path / "cases.csv", cases, {})
    write_lesions_csv(tmp_path / "lesions.csv", cases)
    rows = (tmp_path / "cases.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == list(FIVE.structure_names)
    lesions = (tmp_path / "lesions.csv").read_text().splitlines()
    assert lesions[0].split(",")[-1] == "structure"
    assert {row.split(",")[-1] for row in lesions[1:]} == {"liver_tumour", "kidney_cyst"}
    lines = format_summary(summary)
    for name in FIVE.structure_names:
        assert any(line.startswith(name) for line in lines)
    tags = collect_headline_figures(summary)
    assert "evaluation/kidney/dice_per_case" in tags
    assert "evaluation/lesions/kidney_cyst/recall_detected" in tags
    assert "evaluation/liver_tumour/burden_rmse_pct" in tags


def test_the_general_form_has_the_figures_of_the_first_form() -> None:
    """LiTS as a scheme with other names: only names and places of the figures differ."""
    labels = scheme_from_labels({"background": 0, "organ": [1, 2], "organ_lesion": 2})
    masks = random_labels(LITS_SCHEME, 7), random_labels(LITS_SCHEME, 8)
    first = aggregate_scores([score_case("a", *masks, SPACING_MM)])
    general = aggregate_scores([score_case("a", *masks, SPACING_MM, labels=labels)])
    for name, renamed in zip(LITS_SCHEME.structure_names, labels.structure_names, strict=True):
        expected = {key: value for key, value in first[name].items() if key != "burden"}
        found = {key: value for key, value in general[renamed].items() if key != "burden"}
        assert found == expected
    assert general["organ_lesion"]["burden"] == first["burden"]


def test_values_outside_of_the_scheme_are_named() -> None:
    truth = random_labels(FIVE, 9)
    with pytest.raises(UserError, match="case_x: the prediction has label 9; known are 0 backgr"):
        score_case("case_x", np.where(truth == 1, 9, truth), truth, SPACING_MM, labels=FIVE)


def test_the_ignore_value_of_the_scheme_is_left_out() -> None:
    labels = scheme_from_labels({"background": 0, "spleen": 1, "ignore": 2})
    truth = np.zeros((4, 8, 8), np.uint8)
    truth[1:3, 2:6, 2:6] = 1
    prediction = truth.copy()
    truth[0] = 2
    prediction[0] = 1
    case = score_case("a", prediction, truth, SPACING_MM, labels=labels)
    assert case["spleen"]["dice"] == 1


def test_nested_structures_are_counted_from_the_union() -> None:
    """Containers hold the voxels of what they contain, also three levels deep."""
    labels = scheme_from_labels(
        {"background": 0, "brain": [1, 2, 3, 4], "core_lesion": [3, 4], "necrotic_lesion": 4}
    )
    truth = random_labels(labels, 11)
    case = score_case("a", truth, truth, SPACING_MM, labels=labels)
    volumes = [case[name]["truth_voxels"] for name in labels.structure_names]
    assert all(outer > inner for outer, inner in pairwise(volumes))
