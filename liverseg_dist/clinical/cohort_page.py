"""`cohort.html`: many followed patients on one page - waterfall, spider plot, a table with links to
the patients' pages."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from liverseg_dist.clinical.page import render_page
from liverseg_dist.clinical.tables import csv_text

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 34
LOW, HIGH = -1.0, 1.0
"""Changes shown; larger ones end at the edge, their values are in the title of the mark."""
COHORT_COLUMNS = (
    "patient", "status", "scans", "days", "recist", "volumetric", "best_sum_change", "last_sum_change",
    "volume_change", "lesions", "new_lesions", "page", "error",
)  # fmt: skip


def summarise_patient(patient: str, content: Mapping[str, Any], page: str) -> dict[str, Any]:
    """A patient's row from its `follow.json`."""
    response = content["response"]
    sums = response["sums_mm"]
    changes = [value / sums[0] - 1 for value in sums] if sums else []
    new = {name for date in response["dates"] for name in date["new_lesions"]}
    return {
        "patient": patient,
        "status": "done",
        "scans": len(content["scans"]),
        "days": None if content["days"] is None else content["days"][-1],
        "recist": response["recist"],
        "volumetric": response["volumetric"],
        # The first change is that of the baseline to itself, always 0.
        "best_sum_change": min(changes[1:]) if changes else None,
        "last_sum_change": changes[-1] if changes else None,
        "volume_change": content["total"]["change"],
        "lesions": len(content["lesions"]),
        "new_lesions": len(new),
        "page": page,
        "times": content["days"] or list(range(len(content["scans"]))),
        "changes": changes,
    }


def cohort_csv(rows: Sequence[Mapping[str, Any]], failures: Mapping[str, str]) -> str:
    """A row per patient; failed ones with the error."""
    failed = [
        {"patient": name, "status": "failed", "error": error} for name, error in failures.items()
    ]
    return csv_text(COHORT_COLUMNS, [*rows, *failed])


def render_cohort(
    title: str, rows: Sequence[Mapping[str, Any]], failures: Mapping[str, str]
) -> str:
    """The page's text."""
    categories: dict[str, int] = {}
    for row in rows:
        categories[row["recist"]] = categories.get(row["recist"], 0) + 1
    return render_page(
        "cohort.html.j2",
        title=title,
        rows=rows,
        failures=failures,
        categories=sorted(categories.items()),
        waterfall=draw_waterfall(rows),
        spider=draw_spider(rows),
    )


def draw_waterfall(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Best change of the targets' sum, a bar per patient, worst first."""
    known = sorted(
        (row for row in rows if row["best_sum_change"] is not None),
        key=lambda row: -row["best_sum_change"],
    )
    # No patient may have a sum of targets; the width must not be divided by 0.
    step = (WIDTH - LEFT - RIGHT) / max(1, len(known))
    marks = _frame()
    for number, row in enumerate(known):
        value = row["best_sum_change"]
        top, bottom = sorted((_y(value), _y(0.0)))
        marks.append(
            Markup(
                '<rect data-category="{c}" class="bar {c}" x="{x}" y="{y}" width="{w}" height="{h}">'
                "<title>{title}</title></rect>"
            ).format(
                c=row["recist"],
                x=round(LEFT + number * step + 0.1 * step, 2),
                y=top,
                w=round(0.8 * step, 2),
                # At least one pixel: a change of 0 stays visible.
                h=round(max(bottom - top, 1.0), 2),
                title=f"{row['patient']}: {100 * value:+.0f} %, {row['recist']}",
            )
        )
    return _svg(marks, "best change of the sum of targets, a bar per patient")


def draw_spider(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Change of the targets' sum over time, a line per patient."""
    longest = max([row["times"][-1] for row in rows if row["changes"]] or [1.0]) or 1.0
    marks = _frame()
    for row in rows:
        if not row["changes"]:
            continue
        points = []
        for time, change in zip(row["times"], row["changes"], strict=True):
            points.append(
                f"{round(LEFT + time / longest * (WIDTH - LEFT - RIGHT), 1)},{_y(change)}"
            )
        marks.append(
            Markup(
                '<polyline data-category="{c}" class="line {c}" points="{p}"><title>{t}</title></polyline>'
            ).format(c=row["recist"], p=" ".join(points), t=f"{row['patient']}: {row['recist']}")
        )
    marks.append(
        Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(
            WIDTH - RIGHT, HEIGHT - 10, f"{longest:.0f} days"
        )
    )
    return _svg(marks, "change of the sum of targets over time, a line per patient")


def _frame() -> list[Markup]:
    marks = []
    for value, name in (
        (1.0, "+100 %"),
        (0.2, "+20 %"),
        (0.0, "0"),
        (-0.3, "-30 %"),
        (-1.0, "-100 %"),
    ):
        kind = "threshold" if value in (0.2, -0.3) else "grid"
        marks.append(
            Markup(
                '<line x1="{}" y1="{y}" x2="{}" y2="{y}" class="{}"/><text x="{}" y="{}" text-anchor="end">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, kind, LEFT - 5, _y(value) + 4, name, y=_y(value))
        )
    return marks


def _y(change: float) -> float:
    # Changes beyond the axis are drawn at its end.
    share = (min(max(change, LOW), HIGH) - LOW) / (HIGH - LOW)
    return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 1)


def _svg(marks: Sequence[Markup], description: str) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    ).format(WIDTH, HEIGHT, description, Markup("").join(marks))
