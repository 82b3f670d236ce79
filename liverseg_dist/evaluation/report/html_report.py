"""`report.html`: a page that opens offline, can be printed, and lists the worst cases first.

jinja2 renders it with autoescape, so no case name can become markup; pictures are checked when they
are read. The page contains everything except the slices of large cases, which are in `slices/` next
to it (see `shown_cases`).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from liverseg_dist.evaluation.case_scores import (
    burdens_of_summary,
    find_burden,
    find_lesion_scores,
    find_scores,
    lesions_of_summary,
    list_all_lesions,
    list_scored,
    structures_of_summary,
)
from liverseg_dist.evaluation.curves import Curves, draw_curves
from liverseg_dist.evaluation.metrics.lesions import DETECTION_LABELS
from liverseg_dist.evaluation.metrics.registry import CASE_METRICS, METRICS, Metric
from liverseg_dist.evaluation.notes import has_edge_difference, list_distance_notes
from liverseg_dist.evaluation.report.charts import SIZE_NAMES, draw_charts, structure_kinds
from liverseg_dist.evaluation.report.overlays import PLANES
from liverseg_dist.evaluation.shown_cases import collect_pictures, worst_first_key
from liverseg_dist.files import write_text
from liverseg_dist.pages import OVERLAY, load_script, load_theme
from liverseg_dist.pages.palette import SURFACE_RGB, assign_colours, hex_colour

SCRIPTS = ("tables.js", "slices.js", "surface.js", "viewer.js")
WINDOWS = (("Abdomen", 40, 400), ("Narrow", 60, 200), ("Wide", 0, 2000))
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
"""Details in the header of the page, and their titles."""
Case = dict[str, Any]


def write_report(
    folder: Path,
    summary: dict[str, Any],
    cases: Sequence[Case],
    pictures: Path | None,
    environment: Mapping[str, str] | None = None,
    training: Mapping[str, Curves] | None = None,
) -> Path:
    """Write `folder/report.html`, and `folder/slices` where the page would be too large.

    Args:
        folder: Folder of the report.
        summary: From `summary.aggregate_scores`, with `failed` (case id: reason) and `details`
            (facts about the run; mappings inside become sections, `audit` is from
            `audit_summary.summarize_audit`) if there are any.
        cases: Scored cases.
        pictures: Folder of `overlays.save_pictures`, if there is one.
        environment: Date, code and hardware.
        training: Training curves by run (`curves.read_curves`).

    Returns:
        Path of the page.
    """
    file = folder / "report.html"
    write_text(
        file, render_report(summary, cases, pictures, environment, training, report_folder=folder)
    )
    return file


def render_report(
    summary: dict[str, Any],
    cases: Sequence[Case],
    pictures: Path | None = None,
    environment: Mapping[str, str] | None = None,
    training: Mapping[str, Curves] | None = None,
    report_folder: Path | None = None,
) -> str:
    """Render the page as text.

    Args:
        report_folder: Folder of the report, for the slices of large cases. None: all slices are
            within the page. All other arguments are those of `write_report`.
    """
    environment = dict(environment or {})
    details = dict(summary.get("details") or {})
    audit = details.pop("audit", None)
    title = str(details.pop("title", "") or "Evaluation")
    header = [(name, details[key]) for key, name in HEADER if details.get(key) is not None]
    header.append(("Cases", summary["n_cases"]))
    if date := environment.pop("date", None):
        header.append(("Date", date))
    # The closed distances equal the open ones away from the scan's edge: rows without information.
    metrics: Sequence[Metric] = METRICS
    if not any(has_edge_difference(case) for case in cases):
        metrics = [metric for metric in METRICS if not metric.is_edge_variant]
    palette = {"overlay": OVERLAY, "lesions": SURFACE_RGB}
    shown_cases = collect_pictures(cases, pictures, report_folder)
    is_ct = all(item["is_ct"] for item in shown_cases)
    structures = structures_of_summary(summary)
    colours = assign_colours(structures, lesions_of_summary(summary))
    template = _make_environment().get_template("report.html.j2")
    return template.render(
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
        training=_draw_runs(training or {}, structure_kinds(summary)),
        shown_cases=shown_cases,
        is_ct=is_ct,
        metrics=metrics,
        case_metrics=[metric for metric in CASE_METRICS if metric.in_case_table],
        chart_metrics=[metric for metric in CASE_METRICS if metric.chart],
        structures=structures,
        lesion_structures=lesions_of_summary(summary),
        burdens=burdens_of_summary(summary),
        kinds={name: f"s{number}" for number, name in enumerate(structures)},
        colours={name: hex_colour(colour) for name, colour in colours.items()},
        find_scores=find_scores,
        find_burden=find_burden,
        find_lesion_scores=find_lesion_scores,
        list_all_lesions=list_all_lesions,
        list_scored=list_scored,
        size_names=SIZE_NAMES,
        detection_labels=DETECTION_LABELS,
        planes=PLANES,
        windows=WINDOWS,
        palette=json.dumps(palette),
        # Files of this package; they contain no text from data.
        theme=Markup(load_theme()),  # nosec B704
        script=Markup(  # nosec B704
            load_script("liverseg_dist.pages", "sort_tables.js")
            + load_script("liverseg_dist.evaluation.report", *SCRIPTS)
        ),
    )


def _make_environment() -> Environment:
    jinja = Environment(
        loader=PackageLoader("liverseg_dist.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters |= {
        "num": _format_number,
        "interval": _format_interval,
        "percent": _format_percent,
        "percent_interval": _format_percent_interval,
        "is_group": _is_group,
        "flat": _flatten_group,
        "plain": _format_setting,
    }
    return jinja


def _draw_runs(
    training: Mapping[str, Curves], kinds: Mapping[str, str]
) -> list[tuple[str, dict[str, Markup]]]:
    """(run, charts by title) of the runs that have curves."""
    runs = []
    for run, curves in training.items():
        charts = draw_curves(curves, kinds)
        if charts:
            runs.append((run, charts))
    return runs


def _format_number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−")


def _format_interval(bounds: Sequence[float] | None, digits: int = 4) -> str:
    if bounds is None:
        return ""
    low, high = (_format_number(bound, digits) for bound in bounds)
    return f"{low} to {high}"


def _format_percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %".replace("-", "−")


def _format_percent_interval(bounds: Sequence[float] | None, digits: int = 1) -> str:
    if bounds is None:
        return ""
    low, high = (_format_percent(bound, digits) for bound in bounds)
    return f"{low} to {high}"


def _is_group(value: object) -> bool:
    return isinstance(value, Mapping)


def _flatten_group(group: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested mappings with dotted names."""
    leaves: list[tuple[str, Any]] = []
    for key, value in group.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            leaves += _flatten_group(value, f"{name}.")
        else:
            leaves.append((name, value))
    return leaves


def _format_setting(value: object) -> str:
    """A value as in a settings file, without quotes; None and booleans as words."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (list, tuple)):
        return str(value)
    items = []
    for item in value:
        text = _format_setting(item)
        items.append(f"({text})" if isinstance(item, (list, tuple)) else text)
    return ", ".join(items)
