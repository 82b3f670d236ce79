"""`report.html`: a page that opens offline, prints, and shows the worst cases first.

Rendered by jinja2 with autoescape, so no case name can become markup; pictures are checked on reading. The page holds
everything but the slices of large cases, which lie in `slices/` beside it (see `shown_cases`).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from liverseg_dist.evaluation.curves import Curves, draw_curves
from liverseg_dist.evaluation.metrics.registry import CASE_METRICS, METRICS, Metric
from liverseg_dist.evaluation.notes import has_edge_difference, list_distance_notes
from liverseg_dist.evaluation.report.charts import SIZE_NAMES, draw_charts
from liverseg_dist.evaluation.report.overlays import PLANES
from liverseg_dist.evaluation.shown_cases import collect_pictures, worst_first_key
from liverseg_dist.files import write_text
from liverseg_dist.labels import STRUCTURES
from liverseg_dist.pages import OVERLAY, load_script, load_theme
from liverseg_dist.pages.palette import LESION_RGB

SCRIPTS = ("tables.js", "slices.js", "surface.js", "viewer.js")
WINDOWS = (("Abdomen", 40, 400), ("Liver", 60, 200), ("Wide", 0, 2000))
"""Presets of the viewer: name, level and width in HU."""
HEADER = (
    ("run", "Run"),
    ("data_set", "Data set"),
    ("store", "Store"),
    ("prediction", "Predictions"),
    ("truth", "True masks"),
    ("part", "Split"),
    ("fold", "Fold"),
    ("input", "Input"),
    ("postprocessing", "Post-processing"),
)
"""Details that stand at the top of the page, and their names there."""
Case = dict[str, Any]


def write_report(
    folder: Path,
    summary: dict[str, Any],
    cases: Sequence[Case],
    pictures: Path | None,
    environment: Mapping[str, str] | None = None,
    training: Mapping[str, Curves] | None = None,
) -> Path:
    """Write `folder/report.html`, and `folder/slices` where the page would grow too large.

    Args:
        folder: Where the report goes.
        summary: That of `aggregate`, with `failed` (case id: reason) and `details` (what the report states about the
            run; mappings inside become sections, `audit` is `data.audit_summary`'s) if there are any.
        cases: Scored cases.
        pictures: Folder of `pictures.save_pictures`, if there is one.
        environment: Date, code and hardware.
        training: Training curves by run (`curves.read_curves`).

    Returns:
        Path of the page.
    """
    file = folder / "report.html"
    write_text(file, render_report(summary, cases, pictures, environment, training, beside=folder))
    return file


def render_report(
    summary: dict[str, Any],
    cases: Sequence[Case],
    pictures: Path | None = None,
    environment: Mapping[str, str] | None = None,
    training: Mapping[str, Curves] | None = None,
    beside: Path | None = None,
) -> str:
    """The page as text; arguments as for `write_report`. Without `beside` all slices are within the page."""
    environment = dict(environment or {})
    details = dict(summary.get("details") or {})
    audit = details.pop("audit", None)
    title = str(details.pop("title", "") or "Evaluation")
    header = [(name, details[key]) for key, name in HEADER if details.get(key) is not None]
    header.append(("Cases", summary["n_cases"]))
    if date := environment.pop("date", None):
        header.append(("Date", date))
    metrics: Sequence[Metric] = METRICS
    if not any(has_edge_difference(case) for case in cases):
        metrics = [metric for metric in METRICS if not metric.is_edge_variant]
    palette = {"overlay": OVERLAY, "lesions": LESION_RGB}
    return (
        _jinja()
        .get_template("report.html.j2")
        .render(
            summary=summary,
            cases=sorted(cases, key=worst_first_key),
            failed=dict(summary.get("failed") or {}),
            details=details,
            header=header,
            audit=audit,
            environment=environment,
            title=title,
            notes=list_distance_notes(cases),
            charts=draw_charts(summary, cases),
            training=_charts_of_runs(training or {}),
            shown_cases=collect_pictures(cases, pictures, beside),
            metrics=metrics,
            case_metrics=[metric for metric in CASE_METRICS if metric.in_case_table],
            chart_metrics=[metric for metric in CASE_METRICS if metric.chart],
            structures=STRUCTURES,
            size_names=SIZE_NAMES,
            planes=PLANES,
            windows=WINDOWS,
            palette=json.dumps(palette),
            # Our own files, no text from data.
            theme=Markup(load_theme()),  # nosec B704
            script=Markup(load_script("liverseg_dist.evaluation.report", *SCRIPTS)),  # nosec B704
        )
    )


def _jinja() -> Environment:
    jinja = Environment(
        loader=PackageLoader("liverseg_dist.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters |= {
        "num": _number,
        "interval": _interval,
        "percent": _percent,
        "percent_interval": _percent_interval,
        "is_group": _is_group,
        "flat": _flat,
        "plain": _plain,
    }
    return jinja


def _charts_of_runs(training: Mapping[str, Curves]) -> list[tuple[str, dict[str, Markup]]]:
    """(run, charts by title) of the runs that have curves."""
    charts = [(run, draw_curves(curves)) for run, curves in training.items()]
    return [(run, made) for run, made in charts if made]


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−")


def _interval(bounds: Sequence[float] | None, digits: int = 4) -> str:
    return "" if bounds is None else f"{_number(bounds[0], digits)} to {_number(bounds[1], digits)}"


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %".replace("-", "−")


def _percent_interval(bounds: Sequence[float] | None, digits: int = 1) -> str:
    return (
        "" if bounds is None else f"{_percent(bounds[0], digits)} to {_percent(bounds[1], digits)}"
    )


def _is_group(value: object) -> bool:
    return isinstance(value, Mapping)


def _flat(group: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested mappings with dotted names."""
    leaves: list[tuple[str, Any]] = []
    for key, value in group.items():
        leaves += (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else [(f"{prefix}{key}", value)]
        )
    return leaves


def _plain(value: object) -> str:
    """As in a settings file: no quotes, no None."""
    if isinstance(value, (list, tuple)):
        return ", ".join(
            f"({_plain(item)})" if isinstance(item, (list, tuple)) else _plain(item)
            for item in value
        )
    if value is None or isinstance(value, bool):
        return "none" if value is None else "yes" if value else "no"
    return str(value)
