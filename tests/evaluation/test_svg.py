"""Axes and marks of the charts: ticks are within the axis, texts cannot become markup."""

import math
from xml.etree import ElementTree

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from liverseg_dist.evaluation.report.svg import (
    Axis,
    nice_high,
    picture,
    rect,
    shown,
    text,
    x_axis,
    y_axis,
)

VALUES = st.floats(-1e6, 1e6)


@given(VALUES, st.floats(1e-3, 1e6))
def test_ticks_of_a_linear_axis_are_few_and_within_it(low: float, extent: float) -> None:
    axis = Axis(low, low + extent, 0.0, 100.0)
    # Below this extent neighbouring floating-point numbers are further apart than the ticks.
    assume(extent > 1e-6 * abs(low))
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 7
    assert ticks == sorted(set(ticks))
    slack = 1e-6 * extent
    assert axis.low - slack <= ticks[0]
    assert ticks[-1] <= axis.high + slack


@given(st.floats(-6, 5), st.floats(0.7, 6))
def test_ticks_of_a_decadic_axis_are_within_it(low_exponent: float, decades: float) -> None:
    axis = Axis(10**low_exponent, 10 ** (low_exponent + decades), 0.0, 100.0, log=True)
    ticks = axis.ticks()
    assert len(ticks) >= 2
    assert ticks == sorted(set(ticks))
    assert axis.low * 0.998 <= ticks[0]
    assert ticks[-1] <= axis.high * 1.002


@given(VALUES)
def test_values_outside_are_drawn_at_the_ends(value: float) -> None:
    axis = Axis(-10.0, 10.0, 300.0, 20.0)  # pixels of a vertical axis go downwards
    assert 20.0 <= axis(value) <= 300.0
    assert axis(-10.0) == 300.0
    assert axis(10.0) == 20.0


def test_a_decadic_axis_has_equal_decades() -> None:
    axis = Axis(1e-4, 1e-2, 0.0, 100.0, log=True)
    assert [axis(1e-4), axis(1e-3), axis(1e-2)] == [0.0, 50.0, 100.0]


@given(st.lists(st.floats(0, 1e6), max_size=5), st.floats(1e-3, 1e3))
def test_upper_bound_contains_all_values_and_is_near(values: list[float], least: float) -> None:
    high = nice_high(values, least)
    highest = max([*values, least])
    assert highest * 0.998 <= high <= highest * 1.6


@pytest.mark.parametrize(
    ("value", "label"),
    [(0.0, "0"), (1e-12, "0"), (-2.5, "−2.5"), (12345.678, "1.235e+04"), (0.1 + 0.2, "0.3")],
)
def test_labels_have_four_digits(value: float, label: str) -> None:
    assert shown(value) == label


def test_texts_are_escaped_and_the_picture_is_xml() -> None:
    marks = [
        text(1, 2, "<script>alert(1)</script>"),
        rect(0, 0, -3, 4, "bar", title='"a" & <b>'),
        *x_axis(Axis(0, 1, 0, 100), 90, 10, "Dice <0>"),
        *y_axis(Axis(1, 1000, 90, 10, log=True), 0, 100, "ml & mm"),
    ]
    page = str(picture(120, 100, marks, 'a "chart"'))
    assert "<script" not in page
    root = ElementTree.fromstring(page)
    assert root.attrib["aria-label"] == 'a "chart"'
    bar = root.find("rect")
    assert bar is not None
    assert bar.attrib["width"] == "0", "a negative width would make the element invalid"
    assert bar[0].text == '"a" & <b>'


def test_labels_of_close_ticks_do_not_overlap() -> None:
    axis = Axis(1000.0, 2000.0, 0.0, 60.0)
    ticks = axis.ticks()
    marks = "".join(map(str, x_axis(axis, 90, 10, "")))
    labels = marks.count('class="tick"')
    assert 1 <= labels < len(ticks)
    assert marks.count('class="grid"') == len(ticks)
    assert math.isclose(axis(ticks[0]), 0.0)
