"""The report's charts as inline SVG: distributions, detection by size, volume and burden. No script, no network."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup

import liverseg_dist.evaluation.report.svg as svg
from liverseg_dist.evaluation.metrics.lesions import DETECTION_TERMS, SIZE_CLASSES
from liverseg_dist.evaluation.metrics.registry import CASE_METRICS, Metric, add_unit
from liverseg_dist.labels import STRUCTURES

Case = dict[str, Any]
WIDTH = 520
SIZE_NAMES = {"under_10mm": "under 10 mm", "10_to_20mm": "10 to 20 mm", "over_20mm": "over 20 mm"}


def draw_charts(summary: dict[str, Any], cases: Sequence[Case]) -> dict[str, Markup]:
    """Charts by name; a chart without any point is left out."""
    charts = {
        metric.name: draw_distribution(summary, cases, metric)
        for metric in CASE_METRICS
        if metric.chart
    }
    charts |= {
        "recall_by_size": draw_recall_by_size(summary),
        "dice_by_size": draw_dice_by_size(cases),
        "burden": draw_burden(cases),
        "volume": draw_volume_error(cases),
        "calibration": draw_calibration(summary),
    }
    return {name: chart for name, chart in charts.items() if chart is not None}


def draw_distribution(
    summary: dict[str, Any], cases: Sequence[Case], metric: Metric
) -> Markup | None:
    """One row a structure: a dot for each case, a box between the quartiles, a bar at the median."""
    title = f"{metric.title} per case"
    axis = svg.Axis(0, 1, 70, WIDTH - 20)
    if metric.chart == "distance":
        title = f"{add_unit(title, metric.unit)} (logarithmic)"
        axis = _distance_axis(cases, metric)
    height, bottom = 230, 186
    marks = svg.x_axis(axis, bottom, 12, title)
    points = 0
    for row, structure in enumerate(STRUCTURES):
        centre = 58 + 86 * row
        values = [
            (case[structure][metric.name], case["case_id"])
            for case in cases
            if case[structure].get(metric.name) is not None
        ]
        points += len(values)
        marks.append(svg.text(60, centre + 4, structure, "end"))
        spread = summary[structure]["spread"][metric.summary_key]
        if spread["median"] is not None:
            left, right, median = axis(spread["q25"]), axis(spread["q75"]), axis(spread["median"])
            marks.append(svg.rect(left, centre - 32, right - left, 64, f"box {structure}"))
            marks += _swarm(values, axis, centre, structure)
            marks.append(svg.line(median, centre - 32, median, centre + 32, f"median {structure}"))
    return svg.picture(WIDTH, height, marks, f"{title}: one dot a case") if points else None


def _distance_axis(cases: Sequence[Case], metric: Metric) -> svg.Axis:
    """A logarithmic axis from 0.2 mm; smaller values are drawn at its start."""
    values = []
    for case in cases:
        for structure in STRUCTURES:
            if (value := case[structure].get(metric.name)) is not None:
                values.append(value)
    return svg.Axis(0.2, svg.nice_high(values, 10.0), 70, WIDTH - 20, log=True)


def draw_recall_by_size(summary: dict[str, Any]) -> Markup | None:
    """Bars: share of the true lesions of a size that were touched, and that were detected."""
    detection = summary["tumour"]["detection"]
    height, bottom, left = 250, 200, 62
    y = svg.Axis(0, 1, bottom, 20)
    marks = svg.y_axis(y, left, WIDTH - 20, "recall")
    step = (WIDTH - 20 - left) / len(SIZE_CLASSES)
    total = 0
    for number, name in enumerate(SIZE_CLASSES):
        middle = left + step * (number + 0.5)
        for side, threshold in ((-1, "iou_0"), (1, "iou_50")):
            part = detection[threshold]["recall_by_size"][name]
            total += part["lesions"]
            if part["recall"] is None:
                continue
            x = middle + (-52 if side < 0 else 4)
            hint = f"{DETECTION_TERMS[threshold]}: {part['detected']} of {part['lesions']}"
            marks.append(
                svg.rect(
                    x, y(part["recall"]), 48, bottom - y(part["recall"]), f"bar {threshold}", hint
                )
            )
            marks.append(
                svg.text(x + 24, y(part["recall"]) - 5, f"{part['recall']:.2f}", "middle", "value")
            )
        lesions = detection["iou_0"]["recall_by_size"][name]["lesions"]
        marks.append(svg.text(middle, bottom + 18, SIZE_NAMES[name], "middle"))
        marks.append(
            svg.text(
                middle,
                bottom + 34,
                f"{lesions} lesion{'' if lesions == 1 else 's'}",
                "middle",
                "tick",
            )
        )
    marks.append(svg.line(left, bottom, WIDTH - 20, bottom, "axis"))
    return svg.picture(WIDTH, height, marks, "Recall of lesions by size") if total else None


def draw_dice_by_size(cases: Sequence[Case]) -> Markup | None:
    """One dot a true lesion: Dice with its match over diameter."""
    lesions = [
        (case["case_id"], row)
        for case in cases
        for row in case["lesions"]
        if row["side"] == "truth"
    ]
    if not lesions:
        return None
    diameters = [row["diameter_mm"] for _, row in lesions]
    x = svg.Axis(
        max(1.0, min(diameters) * 0.8), svg.nice_high(diameters, 30.0), 62, WIDTH - 20, log=True
    )
    y = svg.Axis(0, 1, 206, 16)
    marks = svg.x_axis(x, 206, 16, "diameter of the true lesion, mm") + svg.y_axis(
        y, 62, WIDTH - 20, "Dice of its match"
    )
    for case_id, row in lesions:
        kind = (
            "iou_50" if row["detected_iou_50"] else "iou_0" if row["detected_iou_0"] else "missed"
        )
        hint = f"{case_id}, lesion {row['number']}: {row['diameter_mm']:.1f} mm, Dice {row['dice']:.3f}"
        marks.append(svg.circle(x(row["diameter_mm"]), y(row["dice"]), 3.6, f"dot {kind}", hint))
    return svg.picture(WIDTH, 250, marks, "Dice of lesions over their size")


def draw_burden(cases: Sequence[Case]) -> Markup | None:
    """One dot a case: predicted over true tumour burden in per cent; the diagonal is agreement."""
    known = [case for case in cases if case["burden"]["error"] is not None]
    if not known:
        return None
    values = [100 * case["burden"][side] for case in known for side in ("truth", "prediction")]
    high = svg.nice_high(values, 1.0)
    x, y = svg.Axis(0, high, 62, WIDTH - 20), svg.Axis(0, high, 230, 16)
    marks = svg.x_axis(x, 230, 16, "true burden, %") + svg.y_axis(
        y, 62, WIDTH - 20, "predicted burden, %"
    )
    marks.append(svg.line(x(0), y(0), x(high), y(high), "agreement"))
    for case in known:
        truth, prediction = 100 * case["burden"]["truth"], 100 * case["burden"]["prediction"]
        hint = f"{case['case_id']}: true {truth:.2f} %, predicted {prediction:.2f} %"
        marks.append(svg.circle(x(truth), y(prediction), 4, "dot tumour", hint))
    return svg.picture(WIDTH, 270, marks, "Predicted over true tumour burden")


def draw_volume_error(cases: Sequence[Case]) -> Markup | None:
    """One dot a case and structure: volume error over true volume, both in ml; the line is agreement."""
    shown: list[tuple[float, float, str, str]] = []
    for case in cases:
        score = case["tumour"]
        if score["truth_ml"] > 0 or score["prediction_ml"] > 0:
            shown.append(
                (max(score["truth_ml"], 0.1), score["volume_error_ml"], "tumour", case["case_id"])
            )
    if not shown:
        return None
    bound = svg.nice_high([abs(error) for _, error, _, _ in shown], 1.0)
    volumes = [volume for volume, _, _, _ in shown]
    x = svg.Axis(
        max(0.1, 0.7 * min(volumes)), svg.nice_high(volumes, 10.0), 62, WIDTH - 20, log=True
    )
    y = svg.Axis(-bound, bound, 230, 16)
    marks = svg.x_axis(x, 230, 16, "true tumour volume, ml (logarithmic; none at 0.1)")
    marks += svg.y_axis(y, 62, WIDTH - 20, "predicted minus true, ml")
    marks.append(svg.line(62, y(0), WIDTH - 20, y(0), "agreement"))
    for volume, error, kind, case_id in shown:
        marks.append(
            svg.circle(
                x(volume),
                y(error),
                4,
                f"dot {kind}",
                f"{case_id}: {error:+.1f} ml of {volume:.1f} ml",
            )
        )
    return svg.picture(WIDTH, 270, marks, "Volume error of tumours")


def draw_calibration(summary: dict[str, Any]) -> Markup | None:
    """Share of true voxels over predicted probability, a line a structure; the diagonal is perfect."""
    pooled = summary.get("calibration") or {}
    if not pooled:
        return None
    x, y = svg.Axis(0, 1, 62, WIDTH - 20), svg.Axis(0, 1, 230, 16)
    marks = svg.x_axis(x, 230, 16, "predicted probability") + svg.y_axis(
        y, 62, WIDTH - 20, "share of true voxels"
    )
    marks.append(svg.line(x(0), y(0), x(1), y(1), "agreement"))
    for structure, bins in pooled.items():
        points = [(p, s, v) for p, s, v in zip(*(bins[k] for k in _BIN_KEYS), strict=True) if v]
        for (p1, s1, _), (p2, s2, _) in pairwise(points):
            marks.append(svg.line(x(p1), y(s1), x(p2), y(s2), f"median {structure}"))
        for p, share, voxels in points:
            hint = f"{structure}: predicted {p:.3f}, true {share:.3f}, {voxels:,} voxels"
            marks.append(svg.circle(x(p), y(share), 4, f"dot {structure}", hint))
    return svg.picture(WIDTH, 270, marks, "Calibration of the probabilities")


_BIN_KEYS = ("probability", "true_share", "voxels")


def _swarm(
    values: Sequence[tuple[float, str]],
    axis: Callable[[float], float],
    centre: float,
    structure: str,
) -> list[Markup]:
    """Dots beside each other where they would lie on each other."""
    radius = 3.4 if len(values) <= 150 else 2.0
    levels = 2 * int(30 / (2 * radius)) + 1
    taken: dict[int, int] = {}
    marks = []
    for value, case_id in sorted(values):
        x = axis(value)
        bin_number = int(x // (2 * radius))
        level = taken.get(bin_number, 0)
        taken[bin_number] = level + 1
        level %= levels
        shift = (level + 1) // 2 * (1 if level % 2 else -1) * 2 * radius
        marks.append(
            svg.circle(
                x, round(centre + shift, 1), radius, f"dot {structure}", f"{case_id}: {value:.4g}"
            )
        )
    return marks
