"""Write `cases.csv` (a row per case and structure) and `lesions.csv` (a row per lesion).

`lesions.csv` has the true and the predicted lesions. Undefined values are empty cells.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from liverseg_dist.evaluation.case_scores import (
    find_burden,
    find_lesion_scores,
    has_first_form_of,
    list_all_lesions,
    list_scored,
)
from liverseg_dist.evaluation.metrics.registry import CASE_METRICS
from liverseg_dist.files import natural_key, write_text
from liverseg_dist.texts.csv_output import format_csv

Case = dict[str, Any]


def _metric_columns(block: str) -> list[str]:
    return [metric.name for metric in CASE_METRICS if metric.csv_block == block]


# Columns keep their position over versions: programs may read them by number.
CASE_COLUMNS = (
    "case_id", "structure", "status", *_metric_columns("first"),
    "prediction_ml", "truth_ml", *_metric_columns("volumes"),
    "prediction_voxels", "truth_voxels", "intersection_voxels",
    "tp_iou_50", "fp_iou_50", "fn_iou_50", "tp_iou_0", "fp_iou_0", "fn_iou_0",
    "burden_prediction", "burden_truth", "burden_error", "error", *_metric_columns("appended"),
)  # fmt: skip
LESION_COLUMNS = (
    "case_id", "side", "number", "voxels", "volume_ml", "diameter_mm", "size_class", "z", "y", "x",
    "match", "iou", "dice", "detected_iou_50", "detected_iou_0",
)  # fmt: skip


def write_cases_csv(file: Path, cases: Iterable[Case], failures: Mapping[str, str]) -> None:
    """Write the scores of all cases; a failed case has a row with status `failed` and the error."""
    rows: list[dict[str, object]] = []
    for case in _sort_naturally(cases):
        for structure in list_scored(case):
            rows.append(_make_case_row(case, structure))
    for case_id, error in failures.items():
        rows.append({"case_id": case_id, "status": "failed", "error": error})
    write_text(file, format_csv(CASE_COLUMNS, rows))


def write_lesions_csv(file: Path, cases: Iterable[Case]) -> None:
    """Write a row for each listed lesion of all cases.

    The structure has a column, except for LiTS, which has one lesion structure.
    """
    ordered = _sort_naturally(cases)
    columns: tuple[str, ...] = LESION_COLUMNS
    if not has_first_form_of(ordered):
        columns = (*LESION_COLUMNS, "structure")
    rows = []
    for case in ordered:
        for structure, lesion in list_all_lesions(case):
            rows.append(_make_lesion_row(case["case_id"], lesion) | {"structure": structure})
    write_text(file, format_csv(columns, rows))


def _sort_naturally(cases: Iterable[Case]) -> list[Case]:
    """By case id, with liver_2 before liver_10."""
    return sorted(cases, key=lambda case: natural_key(case["case_id"]))


def _make_case_row(case: Case, structure: str) -> dict[str, object]:
    row = {"case_id": case["case_id"], "structure": structure, "status": "done", **case[structure]}
    lesions = find_lesion_scores(case, structure)
    if lesions is not None:
        for threshold, counts in lesions["detection"].items():
            row |= {f"{name}_{threshold}": count for name, count in counts.items()}
    burden = find_burden(case, structure)
    if burden is not None:
        row |= {f"burden_{name}": value for name, value in burden.items()}
    return row


def _make_lesion_row(case_id: str, lesion: Mapping[str, Any]) -> dict[str, object]:
    z, y, x = lesion["centre_zyx"]
    match = " ".join(str(number) for number in lesion["match"])
    return {**lesion, "case_id": case_id, "z": z, "y": y, "x": x, "match": match}
