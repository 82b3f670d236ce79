"""SVG marks and axes for the charts of all pages.

Functions are named after the SVG elements that they return. Texts are escaped. Colours are in the
style sheets: a mark has a class (`kind`), no colour.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDEST_CHARACTER_PX = 8.0
"""Widest character of a tick's label, in the font size of narrow pages."""


@dataclass(frozen=True)
class Axis:
    """Maps values in [low, high] to pixels [start, stop]; `log` for a decadic scale."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        # Values outside the axis are drawn at its ends.
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 2)

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        if self.log:
            ticks = self._log_ticks((1, 2, 5))
            # An axis of few decades needs closer ticks.
            return ticks if len(ticks) > 3 else self._log_ticks(range(1, 10))
        # About five ticks, at multiples of a round step.
        raw = (self.high - self.low) / 5
        magnitude = 10.0 ** math.floor(math.log10(raw))
        step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _log_ticks(self, steps: Sequence[int]) -> list[float]:
        """Multiples of the powers of ten by `steps`."""
        ticks = []
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for decade in decades:
            for multiple in steps:
                tick = multiple * 10.0**decade
                if self.low * 0.999 <= tick <= self.high * 1.001:
                    ticks.append(tick)
        return ticks


def nice_high(values: Sequence[float], least: float) -> float:
    """A round upper bound for an axis that contains all values, `least` at the lowest."""
    highest = max([*values, least])
    magnitude = 10.0 ** math.floor(math.log10(highest))
    steps = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)
    return next(step * magnitude for step in steps if step * magnitude >= highest * 0.999)


def circle(x: float, y: float, radius: float, kind: str, title: str) -> Markup:
    return Markup('<circle cx="{}" cy="{}" r="{}" class="{}"><title>{}</title></circle>').format(
        x, y, radius, kind, title
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>').format(x1, y1, x2, y2, kind)


def polyline(points: Sequence[tuple[float, float]], kind: str) -> Markup:
    coordinates = " ".join(f"{x:g},{y:g}" for x, y in points)
    return Markup('<polyline points="{}" class="{}"/>').format(coordinates, kind)


def rect(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> Markup:
    inner = Markup("<title>{}</title>").format(title) if title else Markup("")
    return Markup('<rect x="{}" y="{}" width="{}" height="{}" class="{}">{}</rect>').format(
        round(x, 2), round(y, 2), round(max(width, 0), 2), round(max(height, 0), 2), kind, inner
    )


def text(x: float, y: float, content: str, anchor: str = "start", kind: str = "label") -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}" class="{}">{}</text>').format(
        x, y, anchor, kind, content
    )


def x_axis(axis: Axis, y: float, top: float, title: str) -> list[Markup]:
    """Grid lines from `top` to `y`, labels below `y`, and the title."""
    marks = []
    free_from = -math.inf
    for tick in axis.ticks():
        x, label = axis(tick), shown(tick)
        marks.append(line(x, top, x, y, "grid"))
        half = WIDEST_CHARACTER_PX * len(label) / 2
        # Where ticks are close, some have no label: labels must not overlap.
        if x - half >= free_from:
            marks.append(text(x, y + 15, label, "middle", "tick"))
            free_from = x + half + WIDEST_CHARACTER_PX
    return [*marks, text((axis.start + axis.stop) / 2, y + 32, title, "middle", "title")]


def y_axis(axis: Axis, x: float, right: float, title: str) -> list[Markup]:
    """Grid lines from `x` to `right`, labels left of `x`, and the turned title."""
    marks = []
    for tick in axis.ticks():
        marks.append(line(x, axis(tick), right, axis(tick), "grid"))
        marks.append(text(x - 6, axis(tick) + 4, shown(tick), "end", "tick"))
    middle = (axis.start + axis.stop) / 2
    turned = Markup(
        '<text transform="translate({},{}) rotate(-90)" text-anchor="middle" '
        'class="title">{}</text>'
    )
    return [*marks, turned.format(x - 48, middle, title)]


def picture(width: int, height: int, marks: Sequence[Markup], description: str) -> Markup:
    """The `<svg>` element; screen readers read the description aloud."""
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, description, Markup("").join(escape(mark) for mark in marks)
    )


def shown(value: float) -> str:
    """A number as a label: four digits, and a minus sign instead of a hyphen."""
    return f"{value:.4g}".replace("-", "−") if abs(value) >= 1e-9 else "0"
