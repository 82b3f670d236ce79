"""`lesions.csv` and `structures.csv`: a row per lesion, a row per case and structure.

Undefined values are empty cells. A cell that a spreadsheet would take for a formula gets a leading
apostrophe.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from liverseg_dist.texts.csv_output import format_csv

LESION_COLUMNS = (
    "case", "structure", "lesion", "volume_ml", "long_axis_mm", "short_axis_mm", "longest_3d_mm", "sphericity",
    "centroid_r_mm", "centroid_a_mm", "centroid_s_mm", "surface_distance_mm", "is_lower_bound", "cut_by", "voxels",
    "intensity_mean", "intensity_sd", "intensity_p10", "intensity_median", "intensity_p90",
    "volume_low_ml", "volume_expected_ml", "volume_high_ml",
)  # fmt: skip
STRUCTURE_COLUMNS = (
    "case", "structure", "status", "kind", "inside", "volume_ml", "burden", "lesions", "is_lower_bound", "cut_by",
    "voxels", "centroid_r_mm", "centroid_a_mm", "centroid_s_mm",
    "intensity_mean", "intensity_sd", "intensity_p10", "intensity_median", "intensity_p90",
    "volume_low_ml", "volume_expected_ml", "volume_high_ml", "error",
)  # fmt: skip
SIGNIFICANT_DIGITS = 6
Row = dict[str, Any]


def lesions_csv(cases: Iterable[Mapping[str, Any]]) -> str:
    """The rows of all lesions of cases as `CaseQuantities.to_json` gives them, each with its
    `case`."""
    rows = []
    for case in cases:
        for lesion in case["lesions"]:
            rows.append({"case": case["case"], "lesion": lesion["number"], **_flat(lesion)})
    return csv_text([*LESION_COLUMNS, *_channel_columns(rows)], rows)


def structures_csv(cases: Iterable[Mapping[str, Any]], failures: Mapping[str, str]) -> str:
    """The rows of all structures; a case that failed has one row with status `failed` and the
    error."""
    rows: list[Row] = []
    for case in cases:
        for structure in case["structures"]:
            rows.append({"case": case["case"], "status": "done", **_flat(structure)})
    for name, error in failures.items():
        rows.append({"case": name, "status": "failed", "error": error})
    return csv_text([*STRUCTURE_COLUMNS, *_channel_columns(rows)], rows)


def _channel_columns(rows: Iterable[Row]) -> list[str]:
    """Columns of further channels, only where a scan has them."""
    found = {key: None for row in rows for key in row if key.startswith("channel_")}
    return sorted(found, key=lambda key: int(key.split("_")[1]))


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV text; keys that are no column are left out."""
    return format_csv(columns, rows, float_digits=SIGNIFICANT_DIGITS)


def _flat(entry: Mapping[str, Any]) -> Row:
    """Nested groups as columns."""
    row = dict(entry)
    row["cut_by"] = " ".join(entry["cut_by"])
    row["is_lower_bound"] = bool(entry["cut_by"])
    if entry["centroid_mm"] is not None:
        row |= dict(
            zip(
                ("centroid_r_mm", "centroid_a_mm", "centroid_s_mm"),
                entry["centroid_mm"],
                strict=True,
            )
        )
    for name, value in (entry["intensity"] or {}).items():
        row[f"intensity_{name}"] = value
    for number, channel in enumerate(entry["channels"], start=2):
        for name, value in (channel or {}).items():
            row[f"channel_{number}_{name}"] = value
    for name, value in (entry["volume_range"] or {}).items():
        row[f"volume_{name}_ml"] = value
    return row
