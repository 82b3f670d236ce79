"""`report.html`: one self-contained page that opens offline, prints, and shows the worst cases first.

Rendered by jinja2 with autoescape, so no case name can become markup; pictures are data URIs checked on reading.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from liverseg_dist.evaluation.report.charts import SIZE_NAMES, all_charts
from liverseg_dist.evaluation.report.overlays import PLANES, load_pictures
from liverseg_dist.files import write_text
from liverseg_dist.labels import STRUCTURES

NUM_WORST = 8
NUM_BEST = 2
MAX_PICTURE_BYTES = 24 << 20
"""Pictures embedded in one page at most."""
METRICS = (
    ("dice_per_case", "Dice per case", 4),
    ("dice_global", "Dice global", 4),
    ("jaccard", "Jaccard", 4),
    ("voe", "VOE", 4),
    ("rvd", "RVD", 4),
    ("assd_mm", "ASSD, mm", 3),
    ("rmsd_mm", "RMSD, mm", 3),
    ("mssd_mm", "MSSD, mm", 2),
    ("hd95_mm", "HD95, mm", 2),
    ("nsd_1mm", "NSD at 1 mm", 4),
    ("nsd_2mm", "NSD at 2 mm", 4),
    ("volume_error_ml", "Volume error, ml", 2),
)
LOWER_IS_BETTER = {"voe", "assd_mm", "rmsd_mm", "mssd_mm", "hd95_mm"}
Case = dict[str, Any]


def write_report(
    folder: Path,
    summary: dict[str, Any],
    cases: Sequence[Case],
    pictures: Path | None,
    environment: Mapping[str, str] | None = None,
) -> Path:
    """Write `folder/report.html`; returns its path.

    `summary` is that of `aggregate`, with `failed` (case id: reason) and `details` (what to tell about the run;
    mappings inside become sections, `audit` is `data.audit_summary`'s) if there are any. `pictures` is a folder of
    `pictures.save_pictures`, `environment` names code and hardware.
    """
    file = folder / "report.html"
    write_text(file, render_report(summary, cases, pictures, environment))
    return file


def render_report(
    summary: dict[str, Any],
    cases: Sequence[Case],
    pictures: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
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
        "is_group": _is_group,
        "flat": _flat,
        "plain": _plain,
    }
    loader = jinja.loader
    assert loader is not None
    parts = {
        name: Markup(loader.get_source(jinja, file)[0])  # ours, not the user's  # nosec B704
        for name, file in (("css", "report.css"), ("script", "report.js"))
    }
    details = dict(summary.get("details") or {})
    audit = details.pop("audit", None)
    title = str(details.pop("title", "") or "Evaluation")
    return jinja.get_template("report.html.j2").render(
        summary=summary,
        cases=sorted(cases, key=worst_first_key),
        failed=dict(summary.get("failed") or {}),
        details=details,
        audit=audit,
        environment=dict(environment or {}),
        title=title,
        charts=all_charts(summary, cases),
        shown_cases=_with_pictures(cases, pictures),
        metrics=METRICS,
        lower_is_better=LOWER_IS_BETTER,
        structures=STRUCTURES,
        size_names=SIZE_NAMES,
        planes=PLANES,
        **parts,
    )


def worst_first_key(case: Case) -> tuple[float, float, str]:
    """Sort key, worst first: mean Dice of the two structures, then HD95 of the liver."""
    return (
        (case["liver"]["dice"] + case["tumour"]["dice"]) / 2,
        -(case["liver"]["hd95_mm"] or 0.0),
        case["case_id"],
    )


def cases_to_show(
    cases: Sequence[Case], worst: int = NUM_WORST, best: int = NUM_BEST
) -> list[tuple[str, Case]]:
    """The worst and the best cases with `worst` or `best`; each once, cases without any mask left out."""
    ranked = sorted(
        (case for case in cases if case["liver"]["truth_voxels"] > 0), key=worst_first_key
    )
    worst = min(
        worst, max(len(ranked) - best, (len(ranked) + 1) // 2)
    )  # of few cases, too, some are the best
    chosen = [("worst", case) for case in ranked[:worst]]
    rest = ranked[worst:]
    return chosen + [("best", case) for case in rest[::-1][:best]]


def _with_pictures(cases: Sequence[Case], folder: Path | None) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    room = MAX_PICTURE_BYTES
    for rank, case in cases_to_show(cases):
        pictures = load_pictures(folder, case["case_id"])
        if pictures is not None:
            room -= len(json.dumps(pictures))
            if room < 0:
                break
            shown.append({"rank": rank, "case": case, "pictures": pictures})
    return shown


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−")


def _interval(bounds: Sequence[float] | None, digits: int = 4) -> str:
    return "" if bounds is None else f"{_number(bounds[0], digits)} to {_number(bounds[1], digits)}"


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %".replace("-", "−")


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
