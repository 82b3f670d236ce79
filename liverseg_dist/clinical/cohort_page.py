"""`cohort.html`: many followed patients on one page: waterfall, spider plot, and a table with links
to the patients' pages.

The page is complete without its script. The script filters patients, sorts the table, spreads the
bars that remain, and opens a patient's page from its bar or line. Thousands of patients fit: each is
a row, a bar and a line.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from liverseg_dist.clinical.page import render_page
from liverseg_dist.clinical.tables import csv_text
from liverseg_dist.pages import load_script

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 88, 8, 10, 30
LOW, HIGH = -1.0, 1.0
"""Changes shown; larger ones end at the edge, their values are in the title of the mark."""
CATEGORIES = ("CR", "PR", "SD", "PD", "NE", "non-CR/non-PD", "ND")
"""From the best response to those without one."""
TIME_STEPS_DAYS = (7, 14, 30, 60, 90, 180, 365, 730, 1825, 3650)
MOST_TIME_STEPS = 6
COHORT_COLUMNS = (
    "patient", "status", "scans", "days", "recist", "best_recist", "volumetric", "best_sum_change", "last_sum_change",
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
        "best_recist": response["best"]["recist"],
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
    counts = {name: sum(row["recist"] == name for row in rows) for name in CATEGORIES}
    return render_page(
        "cohort.html.j2",
        title=title,
        rows=rows,
        failures=failures,
        categories=[(name, count) for name, count in counts.items() if count],
        volumetric=[name for name in CATEGORIES if any(r["volumetric"] == name for r in rows)],
        colour_class=colour_class,
        waterfall=draw_waterfall(rows),
        spider=draw_spider(rows),
        # Files of the package.
        script=Markup(  # nosec B704
            load_script("liverseg_dist.pages", "sort_tables.js")
            + load_script("liverseg_dist.clinical", "cohort.js")
        ),
    )


def colour_class(category: str) -> str:
    """Class of the style sheet for a category: `good`, `bad` or `same`; `other` without a
    response."""
    return {"CR": "good", "PR": "good", "SD": "same", "PD": "bad"}.get(category, "other")


def draw_waterfall(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Best change of the targets' sum, a bar per patient, worst first.

    Bars carry the patient's position in the table (`data-row`).
    """
    known = [index for index, row in enumerate(rows) if row["best_sum_change"] is not None]
    known.sort(key=lambda index: -rows[index]["best_sum_change"])
    # No patient may have a sum of targets; the width must not be divided by 0.
    step = (WIDTH - LEFT - RIGHT) / max(1, len(known))
    marks = [_frame()]
    for number, index in enumerate(known):
        row = rows[index]
        value = row["best_sum_change"]
        top, bottom = sorted((_y(value), _y(0.0)))
        marks.append(
            Markup(
                '<rect data-row="{row}" class="{c}" x="{x}" y="{y}" width="{w}" height="{h}">'
                "<title>{title}</title></rect>"
            ).format(
                row=index,
                c=colour_class(row["recist"]),
                x=round(LEFT + number * step, 2),
                y=top,
                # Gaps between hundreds of bars are narrower than a pixel and only blur them.
                w=round((0.85 if step > 4 else 1.0) * step, 2),
                # At least one unit: a change of 0 stays visible.
                h=round(max(bottom - top, 1.0), 2),
                title=f"{row['patient']}: {100 * value:+.0f} %, {row['recist']}",
            )
        )
    return _svg(marks, "best change of the sum of targets, a bar per patient")


def draw_spider(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Change of the targets' sum over time, a line per patient."""
    longest = max([row["times"][-1] for row in rows if row["changes"]] or [1.0]) or 1.0
    marks = [_frame(), _time_axis(longest)]
    for index, row in enumerate(rows):
        if not row["changes"]:
            continue
        points = []
        for time, change in zip(row["times"], row["changes"], strict=True):
            points.append(f"{_x(time, longest)},{_y(change)}")
        marks.append(
            Markup(
                '<polyline data-row="{row}" class="{c}" points="{p}"><title>{t}</title></polyline>'
            ).format(
                row=index,
                c=colour_class(row["recist"]),
                p=" ".join(points),
                t=f"{row['patient']}: {100 * row['changes'][-1]:+.0f} %, {row['recist']}",
            )
        )
    return _svg(marks, "change of the sum of targets over time, a line per patient")


def _frame() -> Markup:
    marks = []
    for value, name in (
        (1.0, "+100 %"),
        (0.2, "+20 %"),
        (0.0, "0"),
        (-0.3, "\u221230 %"),
        (-1.0, "\u2212100 %"),
    ):
        kind = "threshold" if value in (0.2, -0.3) else "grid"
        marks.append(
            Markup(
                '<line x1="{}" y1="{y}" x2="{}" y2="{y}" class="{}"/><text x="{}" y="{}" text-anchor="end">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, kind, LEFT - 6, _y(value) + 4, name, y=_y(value))
        )
    return Markup("").join(marks)


def _time_axis(longest: float) -> Markup:
    """Days below the chart."""
    step = next((s for s in TIME_STEPS_DAYS if longest / s <= MOST_TIME_STEPS), longest)
    marks = []
    for number in range(int(longest / step + 1e-9) + 1):
        day = number * step
        text = f"{day:.0f}" if number else "0 days"
        marks.append(
            Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
                _x(day, longest), HEIGHT - 8, text
            )
        )
    return Markup("").join(marks)


def _x(time: float, longest: float) -> float:
    return round(LEFT + time / longest * (WIDTH - LEFT - RIGHT), 1)


def _y(change: float) -> float:
    # Changes beyond the axis are drawn at its end.
    share = (min(max(change, LOW), HIGH) - LOW) / (HIGH - LOW)
    return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 1)


def _svg(marks: Sequence[Markup], description: str) -> Markup:
    return Markup(
        '<svg class="chart cohort" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    ).format(WIDTH, HEIGHT, description, Markup("").join(marks))
