"""Charts of a follow-up as SVG: volumes of lesions, and the sum of the targets with its
thresholds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from liverseg_dist.clinical.recist import PARTIAL_RESPONSE, PROGRESSION
from liverseg_dist.pages import hex_colour, spread_colour

WIDTH, HEIGHT = 520, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 40
NAME_ROOM, NAME_STEP = 26, 17
"""Beside the last date, for the numbers of the lesions; least distance between two of them."""
MAX_CURVES = 12
DATE_WIDTH = 108
"""Of a date on a phone, where the chart is small and its texts are large."""
TICKS = (1.0, 2.0, 2.5, 5.0, 10.0)


def draw_volumes(content: Mapping[str, Any], labels: Sequence[str]) -> Markup:
    """Volume of each lesion and of all together, in ml over the dates."""
    positions = date_positions(content)
    total = content["total"]["volume_ml"]
    # At least 0.1 ml: `_frame` takes a logarithm, which 0 does not have.
    highest = max([*(v for v in total if v is not None), 0.1])
    marks = _frame(positions, labels, highest, "ml")
    largest = sorted(content["lesions"], key=lambda one: -max(v or 0.0 for v in one["volume_ml"]))[
        :MAX_CURVES
    ]
    ends = []
    for lesion in largest:
        # By the id, not the position: a lesion's colour does not depend on the other lesions.
        colour = hex_colour(spread_colour(lesion["id"]))
        marks.append(
            _curve(positions, lesion["volume_ml"], highest, colour, f"lesion {lesion['id']}")
        )
        last = lesion["volume_ml"][-1]
        if last is not None:
            ends.append((_y(last, highest), str(lesion["id"]), colour))
    marks.append(_curve(positions, total, highest, "", "all lesions"))
    marks.append(_curve_names(ends))
    return _svg(marks, "volumes over the dates")


def _curve_names(ends: Sequence[tuple[float, str, str]]) -> Markup:
    """The lesions' numbers beside the ends of their curves; those that would overlap move up."""
    names = []
    free = float(HEIGHT - BOTTOM)
    for y, name, colour in sorted(ends, reverse=True):
        at = min(y, free)
        free = at - NAME_STEP
        names.append(
            Markup('<text class="curve-name" x="{}" y="{}" style="fill:{}">{}</text>').format(
                WIDTH - RIGHT - NAME_ROOM + 8, round(at + 4, 1), colour, name
            )
        )
    return Markup("").join(names)


def draw_sums(content: Mapping[str, Any], labels: Sequence[str]) -> Markup:
    """Sum of the targets' long axes, with the thresholds of partial response and progression."""
    positions = date_positions(content)
    sums = content["response"]["sums_mm"]
    # The nadir is the smallest earlier sum; the last date is compared with it.
    baseline, nadir = sums[0], min(sums[:-1])
    lines = (
        ((1 - PARTIAL_RESPONSE) * baseline, "PR: -30 % of baseline"),
        ((1 + PROGRESSION) * nadir, "PD: +20 % of nadir"),
    )
    highest = 1.15 * max([*sums, *(value for value, _ in lines)])
    marks = _frame(positions, labels, highest, "mm")
    for value, name in lines:
        y = _y(value, highest)
        marks.append(
            Markup(
                '<line x1="{}" y1="{}" x2="{}" y2="{}" class="threshold"/>'
                '<text x="{}" y="{}" text-anchor="end">{}</text>'
            ).format(LEFT, y, WIDTH - RIGHT, y, WIDTH - RIGHT, y + 14, name)
        )
    marks.append(_curve(positions, sums, highest, "", "sum of the targets"))
    return _svg(marks, "sum of the target lesions over the dates")


def date_positions(content: Mapping[str, Any]) -> list[float]:
    """Horizontal pixels of the dates: by days where they are known, else evenly."""
    days = content["days"] or list(range(len(content["scans"])))
    # A single date, or dates on one day, would divide by 0.
    span = max(days[-1] - days[0], 1e-9)
    return [
        round(LEFT + 12 + (day - days[0]) / span * (WIDTH - RIGHT - LEFT - 12 - NAME_ROOM), 1)
        for day in days
    ]


def _frame(
    positions: Sequence[float], labels: Sequence[str], highest: float, unit: str
) -> list[Markup]:
    marks = []
    raw = highest / 4
    magnitude = 10.0 ** math.floor(math.log10(raw))
    # The tolerance accepts a tick that rounding puts just below the exact quarter.
    step = next(tick * magnitude for tick in TICKS if tick * magnitude >= raw * 0.999)
    for number in range(int(highest / step + 1e-9) + 1):
        y = _y(number * step, highest)
        marks.append(
            Markup(
                '<line x1="{}" y1="{}" x2="{}" y2="{}" class="grid"/><text x="{}" y="{}" text-anchor="end">{}</text>'
            ).format(LEFT, y, WIDTH - RIGHT, y, LEFT - 6, y + 4, f"{number * step:g}")
        )
    marks.append(Markup('<text x="4" y="{}">{}</text>').format(TOP + 2, unit))
    last = len(labels) - 1
    free, end = -math.inf, positions[-1] - DATE_WIDTH
    for index, (x, label) in enumerate(zip(positions, labels, strict=True)):
        anchor = "start" if index == 0 else "end" if index == last else "middle"
        # Labels that would overlap the one before or the last one are left out.
        half = DATE_WIDTH / 2
        if 0 < index < last and (x - half < free or x + half > end):
            continue
        free = x + (DATE_WIDTH if index == 0 else half)
        marks.append(
            Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(
                x, HEIGHT - 20, anchor, label
            )
        )
    return marks


def _curve(
    positions: Sequence[float],
    values: Sequence[float | None],
    highest: float,
    colour: str,
    name: str,
) -> Markup:
    points = []
    for x, value in zip(positions, values, strict=True):
        if value is not None:
            points.append((x, _y(value, highest)))
    path = " ".join(f"{x},{y}" for x, y in points)
    kind, style = ("total", "") if not colour else ("curve", f"stroke:{colour}")
    dots = Markup("").join(
        Markup('<circle cx="{}" cy="{}" r="3" style="fill:{}"><title>{}</title></circle>').format(
            x, y, colour or "currentColor", name
        )
        for x, y in points
    )
    return Markup(
        '<polyline points="{}" class="{}" style="{}"><title>{}</title></polyline>{}'
    ).format(path, kind, style, name, dots)


def _y(value: float, highest: float) -> float:
    return round(HEIGHT - BOTTOM - value / highest * (HEIGHT - BOTTOM - TOP), 1)


def _svg(marks: Sequence[Markup], description: str) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    ).format(WIDTH, HEIGHT, description, Markup("").join(marks))
