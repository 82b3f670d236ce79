"""Position of the 64-slice slabs for each policy, their padding, and what they lose."""

import numpy as np
import pytest

from liverseg_dist.config import SlabConfig
from liverseg_dist.data.preprocessing.slab import Slab, mark_padding, place_slabs
from liverseg_dist.data.preprocessing.slab_coverage import (
    describe_coverage,
    describe_slabs,
    measure_coverage,
    pool_coverage,
)
from liverseg_dist.label_scheme import scheme_from_labels
from liverseg_dist.labels import IGNORE, LITS_SCHEME
from liverseg_dist.volume import Grid, Volume


def scan(slices: int, spacing_z: float = 2.0) -> Grid:
    affine = np.diag([1.0, 1.0, spacing_z, 1.0])
    affine[:3, 3] = (-5, 7, 100)
    return Grid((slices, 12, 10), affine)


def label_on(grid: Grid, liver: tuple[int, int], *tumours: tuple[int, int]) -> Volume:
    voxels = np.zeros(grid.shape, np.uint8)
    voxels[liver[0] : liver[1], 2:8, 2:8] = 1
    for first, last in tumours:
        voxels[first:last, 3:5, 3:5] = 2
    return Volume(voxels, grid)


def place_for_policy(
    grid: Grid, label: Volume | None, policy: str, spacing_mm: tuple | None = None
) -> tuple[Slab, ...]:
    slabs = place_slabs(grid, label, spacing_mm, SlabConfig(policy=policy, margin_mm=10))
    assert all(slab.grid.shape[0] == 64 for slab in slabs)
    return slabs


def first_slice_mm(slab: Slab) -> float:
    return float(slab.grid.world_mm(np.array([0, 0, 0]))[2])


def test_fit_keeps_native_slices_when_the_liver_fits() -> None:
    grid = scan(200)
    (slab,) = place_for_policy(grid, label_on(grid, (80, 120)), "fit")
    assert slab.grid.spacing_mm == grid.spacing_mm
    assert first_slice_mm(slab) == 100 + 2 * (100 - 32)
    assert slab.valid_slices == (0, 64)


def test_fit_uses_thicker_slices_for_a_longer_liver() -> None:
    grid = scan(200)
    (slab,) = place_for_policy(grid, label_on(grid, (40, 140)), "fit")
    low_mm, high_mm = (
        100 + 2 * (40 - 0.5) - 10,
        100 + 2 * (140 - 0.5) + 10,
    )  # outer faces of the liver, and the margin
    step = slab.grid.spacing_mm[0]
    assert 64 * step == pytest.approx(high_mm - low_mm)
    assert first_slice_mm(slab) == pytest.approx(low_mm + step / 2)
    assert measure_coverage(label_on(grid, (40, 140)), [slab])["liver_inside"] == 1.0


def test_fit_stays_within_the_scan() -> None:
    grid = scan(90)
    (slab,) = place_for_policy(grid, label_on(grid, (70, 90)), "fit")
    assert first_slice_mm(slab) == 100 + 2 * 26
    assert slab.valid_slices == (0, 64)


@pytest.mark.parametrize("policy", ["fit", "window", "tile"])
@pytest.mark.parametrize(
    ("slices", "valid"), [(20, (22, 42)), (3, (30, 33)), (63, (0, 63)), (64, (0, 64))]
)
def test_short_scans_are_padded_and_the_padding_is_marked(
    policy: str, slices: int, valid: tuple[int, int]
) -> None:
    grid = scan(slices)
    (slab,) = place_for_policy(grid, label_on(grid, (0, slices)), policy)
    assert slab.valid_slices == valid
    marked = mark_padding(np.zeros((64, 2, 2), np.uint8), slab)
    assert (marked[valid[0] : valid[1]] == 0).all()
    assert (marked == IGNORE).all(axis=(1, 2)).sum() == 64 - slices
    inside = slab.grid.index_of(grid.world_mm(np.array([[0, 0, 0], [slices - 1, 0, 0]])))[:, 0]
    assert inside.round(6).tolist() == [valid[0], valid[1] - 1]


def test_window_prefers_tumour_over_liver() -> None:
    grid = scan(300)
    label = label_on(grid, (10, 200), (180, 200))
    (slab,) = place_for_policy(grid, label, "window")
    assert (
        first_slice_mm(slab) == 100 + 2 * 136
    )  # ends with the liver: all tumour, and most liver with it
    coverage = measure_coverage(label, [slab])
    assert coverage["tumour_inside"] == 1.0
    assert coverage["liver_inside"] == pytest.approx((64 * 36) / (190 * 36))


def test_coverage_counts_tumours_that_are_cut_or_missed() -> None:
    grid = scan(300)
    label = label_on(grid, (0, 300), (60, 70), (200, 210), (10, 20))
    slab = Slab(grid.cropped((0, 0, 0), (64, 12, 10)), (0, 64))
    coverage = measure_coverage(label, [slab])
    assert (coverage["tumours_cut"], coverage["tumours_missed"]) == (1, 1)
    assert coverage["tumour_inside"] == pytest.approx(14 / 30)


def test_tiles_overlap_and_cover_the_liver() -> None:
    grid = scan(300)
    label = label_on(grid, (20, 220))
    slabs = place_for_policy(grid, label, "tile")
    starts = [round((first_slice_mm(slab) - 100) / 2) for slab in slabs]
    assert starts == [20, 68, 116, 156]
    assert measure_coverage(label, slabs)["liver_inside"] == 1.0


@pytest.mark.parametrize("policy", ["fit", "window", "tile"])
def test_without_a_label_tiles_cover_the_whole_scan(policy: str) -> None:
    slabs = place_for_policy(scan(150), None, policy)
    starts = [round((first_slice_mm(slab) - 100) / 2) for slab in slabs]
    assert starts == [0, 48, 86]
    assert {slab.grid.spacing_mm[0] for slab in slabs} == {2.0}


def test_spacing_mm_changes_the_voxel_size_in_plane() -> None:
    grid = scan(100)
    (slab,) = place_for_policy(grid, label_on(grid, (40, 60)), "fit", (2.0, 2.0, 2.0))
    assert slab.grid.shape == (64, 6, 5)
    assert slab.grid.spacing_mm == pytest.approx((2, 2, 2))


def test_tumours_too_small_for_the_slabs_voxels_are_counted() -> None:
    """Slices of 2 mm become 12 mm: a tumour of one slice vanishes, a thick one remains."""
    grid = scan(400)
    label = label_on(grid, (0, 400), (100, 130), (301, 302))
    slab = Slab(grid.cropped((0, 0, 0), (384, 12, 10)).with_spacing((12, 1, 1)), (0, 64))
    stored = label.voxels[3:387:6]  # the voxel nearest to each new centre
    assert slab.grid.shape[0] == 64
    coverage = measure_coverage(label, [slab], [stored])
    assert (coverage["tumours"], coverage["tumours_missed"], coverage["tumours_vanished"]) == (
        2,
        0,
        1,
    )
    where, outside, vanished = (
        finding.message for finding in describe_slabs(grid, [slab], coverage)
    )
    assert where == "slab: 384 of 400 slices of 2 mm as 64 of 12 mm (from 0, counted from below)"
    assert outside.startswith(
        "outside the slab: 4.0 % of the liver, 0.0 % of tumour; of 2 tumours 0 cut, 0 missed"
    )
    assert vanished == "1 of 2 tumours are too small for the slab's voxels"


def test_coverage_of_several_scans_is_pooled_by_voxels() -> None:
    grid = scan(300)
    slab = Slab(grid.cropped((0, 0, 0), (64, 12, 10)), (0, 64))
    inside, outside = (
        measure_coverage(label_on(grid, (0, 64)), [slab]),
        measure_coverage(label_on(grid, (64, 256)), [slab]),
    )
    assert pool_coverage([inside, outside])["liver_inside"] == pytest.approx(0.25)
    assert pool_coverage([]) == {}


def test_coverage_of_many_structures_lists_the_incomplete_ones() -> None:
    labels = scheme_from_labels({"background": 0} | {f"organ {n}": n for n in range(1, 7)})
    coverage = dict.fromkeys([f"organ {n}_inside" for n in range(1, 7)], 1.0)
    assert describe_coverage(coverage, labels) == "100.00 % of each of the 6 structures"
    coverage["organ 5_inside"] = 0.875
    text = "87.50 % of the labelled organ 5, 100.00 % of the other 5 structures"
    assert describe_coverage(coverage, labels) == text
    few = {"liver_inside": 1.0, "tumour_inside": 0.98} | dict.fromkeys(
        ("tumours", "tumours_cut", "tumours_missed", "tumours_vanished"), 0
    )
    start = "100.00 % of the labelled liver, 98.00 % of tumour; of 0 tumours"
    assert describe_coverage(few, LITS_SCHEME).startswith(start)
