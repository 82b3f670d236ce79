"""The metrics of a structure: name, title, unit, digits, direction and empty-mask rule of each.

Everything that lists metrics reads this registry: the summary, the report's tables and charts, the
columns of `cases.csv`, TensorBoard tags, terminal output and the comparison of two evaluations. A
new metric is a function in `overlap.py` or `surface.py` that adds its value to the scores of a case
under `Metric.name`, and one entry in `METRICS`.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Literal


class Direction(Enum):
    """Which value of a metric is the best."""

    HIGHER = "higher is better"
    LOWER = "lower is better"
    ZERO = "zero is best; the sign states too much or too little"


@dataclass(frozen=True)
class EmptyMaskRule:
    """Value where a mask is empty. None: undefined; "computed": the definition applies."""

    both: float | Literal["computed"] | None
    no_truth: float | Literal["computed"] | None
    no_prediction: float | Literal["computed"] | None


@dataclass(frozen=True)
class Metric:
    """One metric of a structure."""

    name: str
    """Key in the scores of a case and column of `cases.csv`."""
    title: str
    direction: Direction
    empty_masks: EmptyMaskRule
    unit: str = ""
    digits: int = 4
    """Decimal places in the report and on the terminal."""
    summary_name: str = ""
    """Key in `summary.json`; empty: the same as `name`."""
    summary_title: str = ""
    """Title of the mean over cases; empty: the same as `title`."""
    is_pooled: bool = False
    """Computed from the voxels of all cases together; a single case has no such value."""
    is_edge_variant: bool = False
    """Shown in the report only where a mask reaches the edge of the scan."""
    csv_block: Literal["first", "volumes", "appended"] = "appended"
    """Position in `cases.csv`. New columns are appended: the columns before keep their places."""
    chart: Literal["", "share", "distance"] = ""
    """Chart in the report: none, a linear axis from 0 to 1, or a logarithmic axis in mm."""
    in_case_table: bool = False
    """Column in the report's table of cases."""
    is_compared: bool = False
    """Tested by `liverseg compare`."""
    on_tensorboard: bool = False
    on_terminal: bool = False
    """Printed at the end of `liverseg evaluate` and `liverseg score`."""

    @property
    def summary_key(self) -> str:
        return self.summary_name or self.name

    @property
    def heading(self) -> str:
        """Title with unit, for a table of cases."""
        return add_unit(self.title, self.unit)

    @property
    def summary_heading(self) -> str:
        """Title with unit, for a table of means."""
        return add_unit(self.summary_title or self.title, self.unit)

    def format_value(self, value: float | None) -> str:
        """The value with its unit, for terminals; `undefined` for None."""
        if value is None:
            return "undefined"
        return f"{value:.{self.digits}f} {self.unit}".rstrip()

    def improvement(self, before: float, after: float) -> float:
        """Positive where `after` is better than `before`, negative where it is worse."""
        if self.direction is Direction.HIGHER:
            return after - before
        if self.direction is Direction.LOWER:
            return before - after
        return abs(before) - abs(after)


def add_unit(title: str, unit: str) -> str:
    return f"{title}, {unit}" if unit else title


_OVERLAP = EmptyMaskRule(both=1.0, no_truth=0.0, no_prediction=0.0)
_DISTANCE = EmptyMaskRule(both=None, no_truth=None, no_prediction=None)

# The order is that of the report's table and of `summary.json`.
METRICS = (
    Metric(
        "dice",
        "Dice",
        Direction.HIGHER,
        _OVERLAP,
        summary_name="dice_per_case",
        summary_title="Dice per case",
        csv_block="first",
        chart="share",
        in_case_table=True,
        is_compared=True,
        on_tensorboard=True,
        on_terminal=True,
    ),
    Metric(
        "dice_global",
        "Dice global",
        Direction.HIGHER,
        EmptyMaskRule(both=None, no_truth=0.0, no_prediction=0.0),
        is_pooled=True,
        on_tensorboard=True,
        on_terminal=True,
    ),
    Metric("jaccard", "Jaccard", Direction.HIGHER, _OVERLAP, csv_block="first"),
    Metric("voe", "VOE", Direction.LOWER, EmptyMaskRule(0.0, 1.0, 1.0), csv_block="first"),
    Metric(
        "rvd",
        "RVD",
        Direction.ZERO,
        EmptyMaskRule(both=0.0, no_truth=None, no_prediction=-1.0),
        csv_block="first",
        is_compared=True,
    ),
    Metric(
        "assd_mm",
        "ASSD",
        Direction.LOWER,
        _DISTANCE,
        unit="mm",
        digits=3,
        csv_block="first",
        chart="distance",
        is_compared=True,
        on_tensorboard=True,
    ),
    Metric("rmsd_mm", "RMSD", Direction.LOWER, _DISTANCE, "mm", 3, csv_block="first"),
    Metric("mssd_mm", "MSSD", Direction.LOWER, _DISTANCE, "mm", 2, csv_block="first"),
    Metric(
        "hd95_mm",
        "HD95",
        Direction.LOWER,
        _DISTANCE,
        unit="mm",
        digits=2,
        csv_block="first",
        chart="distance",
        in_case_table=True,
        is_compared=True,
        on_tensorboard=True,
        on_terminal=True,
    ),
    Metric(
        "nsd_1mm",
        "NSD at 1 mm",
        Direction.HIGHER,
        _OVERLAP,
        csv_block="first",
        is_compared=True,
        on_tensorboard=True,
    ),
    Metric(
        "nsd_2mm",
        "NSD at 2 mm",
        Direction.HIGHER,
        _OVERLAP,
        csv_block="first",
        chart="share",
        in_case_table=True,
        is_compared=True,
        on_tensorboard=True,
        on_terminal=True,
    ),
    Metric(
        "volume_error_ml",
        "Volume error",
        Direction.ZERO,
        EmptyMaskRule(both=0.0, no_truth="computed", no_prediction="computed"),
        unit="ml",
        digits=2,
        csv_block="volumes",
    ),
    Metric(
        "assd_closed_mm",
        "ASSD closed at the edge",
        Direction.LOWER,
        _DISTANCE,
        "mm",
        3,
        is_edge_variant=True,
    ),
    Metric(
        "rmsd_closed_mm",
        "RMSD closed at the edge",
        Direction.LOWER,
        _DISTANCE,
        "mm",
        3,
        is_edge_variant=True,
    ),
    Metric(
        "mssd_closed_mm",
        "MSSD closed at the edge",
        Direction.LOWER,
        _DISTANCE,
        "mm",
        2,
        is_edge_variant=True,
    ),
)
CASE_METRICS = tuple(metric for metric in METRICS if not metric.is_pooled)
"""Metrics that each case has."""
_BY_SUMMARY_KEY = {metric.summary_key: metric for metric in METRICS}


def find_metric(summary_key: str) -> Metric:
    """The metric with this key in `summary.json`. Raises `KeyError`."""
    return _BY_SUMMARY_KEY[summary_key]
