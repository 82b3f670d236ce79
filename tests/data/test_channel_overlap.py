"""Overlap of two grids against its volume in closed form."""

import numpy as np
import pytest

from liverseg_dist.data.preprocessing.channel_overlap import check_overlap, measure_overlap
from liverseg_dist.volume import Grid


def make_grid(
    shape: tuple[int, int, int] = (24, 24, 24),
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    origin_mm: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Grid:
    """All tuples are x, y, z, except the shape: z, y, x."""
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = origin_mm
    return Grid(shape, affine)


@pytest.mark.parametrize(
    ("other", "share"),
    [
        (make_grid(), 1.0),
        (make_grid(shape=(48, 48, 48), spacing_mm=(0.5, 0.5, 0.5), origin_mm=(-0.25,) * 3), 1.0),
        (make_grid(origin_mm=(12.0, 0.0, 0.0)), 1 / 2),
        (make_grid(origin_mm=(12.0, 12.0, 0.0)), 1 / 4),
        (make_grid(shape=(6, 24, 24)), 1 / 4),
        (make_grid(origin_mm=(24.0, 0.0, 0.0)), 0.0),
        (make_grid(shape=(100, 100, 100), origin_mm=(-30.0, -30.0, -30.0)), 1.0),
    ],
)
def test_share_of_the_reference(other: Grid, share: float) -> None:
    assert measure_overlap(make_grid(), other) == pytest.approx(share)


def test_flipped_axes_cover_the_same() -> None:
    flipped = make_grid(spacing_mm=(-1.0, 1.0, 1.0), origin_mm=(23.0, 0.0, 0.0))
    assert measure_overlap(make_grid(), flipped) == 1.0


@pytest.mark.parametrize(
    ("shift_mm", "severity", "code"),
    [
        (0.0, None, None),
        (11.0, None, None),
        (18.0, "warning", "channel_overlap"),
        (50.0, "error", "channel_no_overlap"),
    ],
)
def test_findings(shift_mm: float, severity: str | None, code: str | None) -> None:
    other = make_grid(origin_mm=(0.0, 0.0, shift_mm))
    share, findings = check_overlap(make_grid(), other, "CT", "T1")
    found = [(finding.severity, finding.code) for finding in findings]
    assert found == ([] if severity is None else [(severity, code)])
    if code == "channel_overlap":
        assert findings[0].message == "channel T1 covers 25 % of channel CT only"
        assert share == pytest.approx(0.25)
