"""The report's charts as inline SVG: distributions, detection by size, volume, burden, calibration.

They need no script and no network.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup

import liverseg_dist.evaluation.report.svg as svg
from liverseg_dist.evaluation.case_scores import (
    find_burden,
    find_scores,
    lesions_of_summary,
    list_all_lesions,
    structures_of_summary,
)
from liverseg_dist.evaluation.metrics.lesions import DETECTION_TERMS, SIZE_CLASSES
from liverseg_dist.evaluation.metrics.registry import CASE_METRICS, Metric, add_unit

Case = dict[str, Any]
WIDTH = 520
ROW_PX, LOW_ROW_PX = (86, 32), (36, 13)
"""Height of a structure's row in a distribution, and half the height of its box, in pixels."""
MAX_TALL_ROWS = 4
"""With more structures the rows are low."""
LEFT, RIGHT = 62, WIDTH - 20
"""Ends of the x axis, pixels."""
SIZE_NAMES = {"under_10mm": "under 10 mm", "10_to_20mm": "10 to 20 mm", "over_20mm": "over 20 mm"}


def draw_charts(summary: dict[str, Any], cases: Sequence[Case]) -> dict[str, Markup]:
    """Draw all charts.

    Returns:
        Charts by name: that of its metric for a distribution. A chart without points is left out.
    """
    charts: dict[str, Markup | None] = {}
    for metric in CASE_METRICS:
        if metric.chart:
            charts[metric.name] = draw_distribution(summary, cases, metric)
    kinds = structure_kinds(summary)
    lesions = lesions_of_summary(summary)
    if lesions:
        charts["recall_by_size"] = draw_recall_by_size(summary, lesions)
        charts["dice_by_size"] = draw_dice_by_size(cases)
        charts["volume"] = draw_volume_error(cases, lesions, kinds)
    charts["burden"] = draw_burden(cases, kinds)
    charts["calibration"] = draw_calibration(summary, kinds)
    return {name: chart for name, chart in charts.items() if chart is not None}


def structure_kinds(summary: dict[str, Any]) -> dict[str, str]:
    """Classes of the marks of each structure; the page gives each class its colour."""
    names = structures_of_summary(summary)
    return {name: f"structure s{number}" for number, name in enumerate(names)}


def draw_distribution(
    summary: dict[str, Any], cases: Sequence[Case], metric: Metric
) -> Markup | None:
    """One row a structure: a dot for each case, a box between quartiles, a bar at the median."""
    title = f"{metric.title} per case"
    values_by_structure = {}
    kinds = structure_kinds(summary)
    for structure in kinds:
        values_by_structure[structure] = _collect_values(cases, structure, metric)
    all_values = [value for values in values_by_structure.values() for value, _ in values]
    if not all_values:
        return None
    # Long names need more space to the left of the axis.
    left_px = max(70, 14 + 7 * max(map(len, kinds)))
    axis = svg.Axis(0, 1, left_px, RIGHT)
    if metric.chart == "distance":
        title = f"{add_unit(title, metric.unit)} (logarithmic)"
        # Smaller distances are drawn at the start of the axis.
        axis = svg.Axis(0.2, svg.nice_high(all_values, 10.0), left_px, RIGHT, log=True)
    row_px, half_px = ROW_PX if len(kinds) <= MAX_TALL_ROWS else LOW_ROW_PX
    bottom = 14 + row_px * len(kinds)
    marks = svg.x_axis(axis, bottom, 12, title)
    for row, (structure, values) in enumerate(values_by_structure.items()):
        centre = 15 + row_px // 2 + row_px * row
        kind = kinds[structure]
        marks.append(svg.text(left_px - 10, centre + 4, structure, "end"))
        spread = summary[structure]["spread"][metric.summary_key]
        if spread["median"] is None:
            continue
        left, right, median = axis(spread["q25"]), axis(spread["q75"]), axis(spread["median"])
        marks.append(svg.rect(left, centre - half_px, right - left, 2 * half_px, f"box {kind}"))
        marks += _draw_swarm(values, axis, centre, half_px, kind)
        marks.append(svg.line(median, centre - half_px, median, centre + half_px, f"median {kind}"))
    return svg.picture(WIDTH, bottom + 44, marks, f"{title}: one dot a case")


def _collect_values(
    cases: Sequence[Case], structure: str, metric: Metric
) -> list[tuple[float, str]]:
    """(value, case id) of the cases where the metric is defined."""
    values = []
    for case in cases:
        value = (find_scores(case, structure) or {}).get(metric.name)
        if value is not None:
            values.append((value, case["case_id"]))
    return values


def draw_recall_by_size(summary: dict[str, Any], lesions: Sequence[str]) -> Markup | None:
    """Bars: share of the true lesions of a size that were touched, and that were detected.

    Lesions of all lesion structures are counted together.
    """
    bottom = 200
    y = svg.Axis(0, 1, bottom, 20)
    marks = svg.y_axis(y, LEFT, RIGHT, "recall")
    step = (RIGHT - LEFT) / len(SIZE_CLASSES)
    total = 0
    for number, name in enumerate(SIZE_CLASSES):
        count = 0
        middle = LEFT + step * (number + 0.5)
        for x, threshold in ((middle - 52, "iou_0"), (middle + 4, "iou_50")):
            parts = [
                summary[lesion]["detection"][threshold]["recall_by_size"][name]
                for lesion in lesions
            ]
            count = sum(part["lesions"] for part in parts)
            detected = sum(part["detected"] for part in parts)
            total += count
            if count == 0:
                continue
            top = y(detected / count)
            hint = f"{DETECTION_TERMS[threshold]}: {detected} of {count}"
            marks.append(svg.rect(x, top, 48, bottom - top, f"bar {threshold}", hint))
            marks.append(svg.text(x + 24, top - 5, f"{detected / count:.2f}", "middle", "value"))
        label = f"{count} lesion{'' if count == 1 else 's'}"
        marks.append(svg.text(middle, bottom + 18, SIZE_NAMES[name], "middle"))
        marks.append(svg.text(middle, bottom + 34, label, "middle", "tick"))
    marks.append(svg.line(LEFT, bottom, RIGHT, bottom, "axis"))
    return svg.picture(WIDTH, 250, marks, "Recall of lesions by size") if total else None


def draw_dice_by_size(cases: Sequence[Case]) -> Markup | None:
    """One dot a true lesion: Dice with its match over diameter."""
    lesions = []
    for case in cases:
        for _, row in list_all_lesions(case):
            if row["side"] == "truth":
                lesions.append((case["case_id"], row))
    if not lesions:
        return None
    diameters = [row["diameter_mm"] for _, row in lesions]
    lowest = max(1.0, min(diameters) * 0.8)
    x = svg.Axis(lowest, svg.nice_high(diameters, 30.0), LEFT, RIGHT, log=True)
    y = svg.Axis(0, 1, 206, 16)
    marks = svg.x_axis(x, 206, 16, "diameter of the true lesion, mm")
    marks += svg.y_axis(y, LEFT, RIGHT, "Dice of its match")
    for case_id, row in lesions:
        kind = "missed"
        if row["detected_iou_50"]:
            kind = "iou_50"
        elif row["detected_iou_0"]:
            kind = "iou_0"
        hint = (
            f"{case_id}, lesion {row['number']}: "
            f"{row['diameter_mm']:.1f} mm, Dice {row['dice']:.3f}"
        )
        marks.append(svg.circle(x(row["diameter_mm"]), y(row["dice"]), 3.6, f"dot {kind}", hint))
    return svg.picture(WIDTH, 250, marks, "Dice of lesions over their size")


def draw_burden(cases: Sequence[Case], kinds: Mapping[str, str]) -> Markup | None:
    """One dot a case: predicted over true burden in per cent; the diagonal is agreement."""
    dots: list[tuple[float, float, str, str]] = []
    for case in cases:
        for structure, kind in kinds.items():
            burden = find_burden(case, structure)
            if burden is None or burden["truth"] is None or burden["prediction"] is None:
                continue
            truth, prediction = 100 * burden["truth"], 100 * burden["prediction"]
            dots.append((truth, prediction, kind, f"{case['case_id']}, {structure}"))
    if not dots:
        return None
    values = []
    for truth, prediction, _, _ in dots:
        values += [truth, prediction]
    high = svg.nice_high(values, 1.0)
    x, y = svg.Axis(0, high, LEFT, RIGHT), svg.Axis(0, high, 230, 16)
    marks = svg.x_axis(x, 230, 16, "true burden, %")
    marks += svg.y_axis(y, LEFT, RIGHT, "predicted burden, %")
    marks.append(svg.line(x(0), y(0), x(high), y(high), "agreement"))
    for truth, prediction, kind, name in dots:
        hint = f"{name}: true {truth:.2f} %, predicted {prediction:.2f} %"
        marks.append(svg.circle(x(truth), y(prediction), 4, f"dot {kind}", hint))
    return svg.picture(WIDTH, 270, marks, "Predicted over true burden")


def draw_volume_error(
    cases: Sequence[Case], lesions: Sequence[str], kinds: Mapping[str, str]
) -> Markup | None:
    """One dot a case: error of the volume of its lesions over their true volume, both in ml."""
    shown: list[tuple[float, float, str, str]] = []
    for case in cases:
        for structure in lesions:
            score = find_scores(case, structure)
            if score is None or (score["truth_ml"] <= 0 and score["prediction_ml"] <= 0):
                continue
            # A logarithmic axis has no zero: no lesion is drawn at 0.1 ml.
            volume_ml = max(score["truth_ml"], 0.1)
            name = f"{case['case_id']}, {structure}"
            shown.append((volume_ml, score["volume_error_ml"], kinds[structure], name))
    if not shown:
        return None
    bound = svg.nice_high([abs(error) for _, error, _, _ in shown], 1.0)
    volumes = [volume for volume, _, _, _ in shown]
    lowest = max(0.1, 0.7 * min(volumes))
    x = svg.Axis(lowest, svg.nice_high(volumes, 10.0), LEFT, RIGHT, log=True)
    y = svg.Axis(-bound, bound, 230, 16)
    marks = svg.x_axis(x, 230, 16, "true volume of lesions, ml (logarithmic; none at 0.1)")
    marks += svg.y_axis(y, LEFT, RIGHT, "predicted minus true, ml")
    marks.append(svg.line(LEFT, y(0), RIGHT, y(0), "agreement"))
    for volume, error, kind, name in shown:
        hint = f"{name}: {error:+.1f} ml of {volume:.1f} ml"
        marks.append(svg.circle(x(volume), y(error), 4, f"dot {kind}", hint))
    return svg.picture(WIDTH, 270, marks, "Volume error of lesions")


def draw_calibration(summary: dict[str, Any], kinds: Mapping[str, str]) -> Markup | None:
    """Share of true voxels over predicted probability, a line a structure; diagonal: ideal."""
    pooled = summary.get("calibration") or {}
    if not pooled:
        return None
    x, y = svg.Axis(0, 1, LEFT, RIGHT), svg.Axis(0, 1, 230, 16)
    marks = svg.x_axis(x, 230, 16, "predicted probability")
    marks += svg.y_axis(y, LEFT, RIGHT, "share of true voxels")
    marks.append(svg.line(x(0), y(0), x(1), y(1), "agreement"))
    for structure, bins in pooled.items():
        columns = zip(bins["probability"], bins["true_share"], bins["voxels"], strict=True)
        # An empty bin has no probability.
        points = [(p, share, voxels) for p, share, voxels in columns if voxels]
        for (p1, s1, _), (p2, s2, _) in pairwise(points):
            marks.append(svg.line(x(p1), y(s1), x(p2), y(s2), f"median {kinds[structure]}"))
        for p, share, voxels in points:
            hint = f"{structure}: predicted {p:.3f}, true {share:.3f}, {voxels:,} voxels"
            marks.append(svg.circle(x(p), y(share), 4, f"dot {kinds[structure]}", hint))
    return svg.picture(WIDTH, 270, marks, "Calibration of the probabilities")


def _draw_swarm(
    values: Sequence[tuple[float, str]],
    axis: Callable[[float], float],
    centre: float,
    half_px: int,
    kind: str,
) -> list[Markup]:
    """Dots of (value, case id); dots that would overlap are shifted up and down in turn."""
    radius = 3.4 if len(values) <= 150 else 2.0
    levels = 2 * int((half_px - 2) / (2 * radius)) + 1
    dots_in_bin: dict[int, int] = {}
    marks = []
    for value, case_id in sorted(values):
        x = axis(value)
        bin_number = int(x // (2 * radius))
        level = dots_in_bin.get(bin_number, 0)
        dots_in_bin[bin_number] = level + 1
        level %= levels
        shift = (level + 1) // 2 * (1 if level % 2 else -1) * 2 * radius
        y = round(centre + shift, 1)
        marks.append(svg.circle(x, y, radius, f"dot {kind}", f"{case_id}: {value:.4g}"))
    return marks
