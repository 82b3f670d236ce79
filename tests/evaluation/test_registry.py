"""The metric registry against the scores, and the outputs that are made from it."""

from pathlib import Path

import numpy as np
import pytest

from liverseg_dist import evaluation
from liverseg_dist.evaluation import aggregate_scores, score_case
from liverseg_dist.evaluation.compare import compare_evaluations
from liverseg_dist.evaluation.metrics.registry import (
    CASE_METRICS,
    METRICS,
    Direction,
    Metric,
    find_metric,
)
from liverseg_dist.evaluation.report.csv_tables import CASE_COLUMNS
from liverseg_dist.evaluation.report.html_report import render_report
from liverseg_dist.evaluation.report.tensorboard import collect_headline_figures
from liverseg_dist.evaluation.report.terminal_summary import format_summary
from tests.evaluation.masks import SHAPE, labels

SPACING = (2.5, 0.7, 0.9)
STRUCTURES = ("liver", "tumour")
EMPTY = np.zeros(SHAPE, dtype=np.uint8)
PUBLISHED_COLUMNS = (
    "case_id,structure,status,dice,jaccard,voe,rvd,assd_mm,rmsd_mm,mssd_mm,hd95_mm,nsd_1mm,nsd_2mm,"
    "prediction_ml,truth_ml,volume_error_ml,prediction_voxels,truth_voxels,intersection_voxels,"
    "tp_iou_50,fp_iou_50,fn_iou_50,tp_iou_0,fp_iou_0,fn_iou_0,burden_prediction,burden_truth,"
    "burden_error,error,assd_closed_mm,rmsd_closed_mm,mssd_closed_mm"
)


def name_of(metric: Metric) -> str:
    return metric.name


@pytest.mark.parametrize("metric", CASE_METRICS, ids=name_of)
def test_scores_follow_the_empty_mask_rule(metric: Metric) -> None:
    rule = metric.empty_masks
    mask = labels(1)
    for expected, prediction, truth in (
        (rule.both, EMPTY, EMPTY),
        (rule.no_truth, mask, EMPTY),
        (rule.no_prediction, EMPTY, mask),
    ):
        case = score_case("a", prediction, truth, SPACING)
        for structure in STRUCTURES:
            value = case[structure][metric.name]
            if expected == "computed":
                assert isinstance(value, float)
            else:
                assert value == expected


def test_global_dice_follows_its_empty_mask_rule() -> None:
    rule = find_metric("dice_global").empty_masks
    for expected, prediction, truth in (
        (rule.both, EMPTY, EMPTY),
        (rule.no_truth, labels(1), EMPTY),
        (rule.no_prediction, EMPTY, labels(1)),
    ):
        summary = aggregate_scores([score_case("a", prediction, truth, SPACING)])
        assert summary["tumour"]["dice_global"] == expected


@pytest.mark.parametrize("metric", CASE_METRICS, ids=name_of)
def test_a_perfect_prediction_is_the_best_value(metric: Metric) -> None:
    perfect = score_case("a", labels(1), labels(1), SPACING)["tumour"][metric.name]
    worse = score_case("a", labels(2), labels(1), SPACING)["tumour"][metric.name]
    assert metric.improvement(worse, perfect) > 0
    assert metric.improvement(perfect, worse) < 0
    assert metric.improvement(worse, worse) == 0
    if metric.direction is Direction.ZERO:
        assert metric.improvement(-worse, worse) == 0


def test_published_columns_keep_their_position() -> None:
    assert ",".join(CASE_COLUMNS).startswith(PUBLISHED_COLUMNS)


def test_every_output_contains_the_registered_metrics() -> None:
    cases = [score_case(f"c{i}", labels(i), labels(i + 1), SPACING) for i in range(3)]
    summary = aggregate_scores(cases)
    page = render_report(summary, cases)
    compared = {row["metric"] for row in compare_evaluations(cases, cases)["metrics"]}
    tags = collect_headline_figures(summary)
    lines = format_summary(summary)
    readme = Path(evaluation.__file__).with_name("README.md").read_text(encoding="utf-8")
    for metric in METRICS:
        assert f"`{metric.name}`" in readme
        assert metric.is_pooled or metric.name in CASE_COLUMNS
        assert metric.is_pooled or (metric.name in compared) == metric.is_compared
        for structure, line in zip(STRUCTURES, lines, strict=False):
            assert metric.summary_key in summary[structure]
            tag = f"evaluation/{structure}/{metric.summary_key}"
            assert (tag in tags) == metric.on_tensorboard
            value = metric.format_value(summary[structure][metric.summary_key])
            printed = f"{metric.summary_title or metric.title} {value}"
            assert (printed in line) == metric.on_terminal
            heading = f">{structure} {metric.heading}</th>"
            assert (heading in page) == metric.in_case_table
        assert metric.is_edge_variant or f"<td>{metric.summary_heading}</td>" in page
        if metric.chart:
            assert f"<h3>{metric.title}</h3>" in page


def test_names_are_unique() -> None:
    for names in ([m.name for m in METRICS], [m.summary_key for m in METRICS]):
        assert len(set(names)) == len(names)
