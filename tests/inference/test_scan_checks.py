"""Warnings about scans that are unlike the training data, and about implausible masks."""

import numpy as np
import pytest

from liverseg_dist.config import Settings, load_settings
from liverseg_dist.data.findings import Finding
from liverseg_dist.inference.scan_checks import (
    Overview,
    check_mask,
    compare_with_training,
    findings_to_json,
    fingerprint_scan_checks,
    format_warnings,
    is_refused,
    join_warnings,
    select_warnings,
)
from liverseg_dist.volume import Grid, Volume

SHAPE = (40, 60, 70)
ERROR = Finding("error", "too_few_slices", "3 slices are too few")
WARNING = Finding("warning", "coarser_than_training", "voxels of 9 mm")
INFO = Finding("info", "reoriented", "axes were turned")


def make_settings() -> Settings:
    return load_settings(
        [],
        [
            "data.spacing_mm=[5,1,1]",
            "data.intensity={lower_hu: 0, upper_hu: 200, mean: 0.5, std: 0.2}",
        ],
    )


def make_grid(spacing_mm: tuple[float, float, float] = (5.0, 3.0, 3.0)) -> Grid:
    z, y, x = spacing_mm
    return Grid(SHAPE, np.diag([x, y, z, 1.0]))


def make_scan(value: int = 100, grid: Grid | None = None) -> Volume:
    """Air with a body of one value."""
    voxels = np.full(SHAPE, -1000, np.int16)
    voxels[:, 5:55, 5:65] = value
    return Volume(voxels, grid or make_grid())


def codes(findings: list[Finding]) -> list[str]:
    return [finding.code for finding in findings]


def test_a_scan_like_the_training_data_has_no_warning() -> None:
    assert compare_with_training(make_scan(grid=make_grid((5, 1, 1))), make_settings()) == []


@pytest.mark.parametrize("spacing_mm", [(16.0, 1.0, 1.0), (5.0, 3.2, 1.0)])
def test_much_coarser_voxels_are_a_warning(spacing_mm: tuple[float, float, float]) -> None:
    (finding,) = compare_with_training(make_scan(grid=make_grid(spacing_mm)), make_settings())
    assert (finding.severity, finding.code) == ("warning", "coarser_than_training")
    assert "details are lost" in finding.message


def test_finer_voxels_are_no_warning() -> None:
    scan = make_scan(grid=make_grid((0.5, 0.3, 0.3)))
    assert compare_with_training(scan, make_settings()) == []


def test_values_outside_of_the_range_of_training_are_a_warning() -> None:
    scan = make_scan(value=1500, grid=make_grid((5, 1, 1)))
    (finding,) = compare_with_training(scan, make_settings())
    assert finding.code == "intensity_unlike_training"
    assert "0.00 % of the voxels lie in the range the network was trained on (0 to 200 HU)" in (
        finding.message
    )


def make_mask(box: tuple[slice, slice, slice], grid: Grid) -> Volume:
    mask = np.zeros(SHAPE, np.uint8)
    mask[box] = 1
    return Volume(mask, grid)


def find_in_mask(box: tuple[slice, slice, slice], value: int = 100) -> list[str]:
    grid = make_grid()
    overview = Overview.from_scan(make_scan(value, grid))
    return codes(check_mask(make_mask(box, grid), overview, make_settings()))


LIVER = (slice(8, 30), slice(15, 45), slice(38, 62))
"""22 x 30 x 24 voxels of 45 mm3: 713 ml, on the patient's right."""


def test_a_mask_of_a_usual_liver_has_no_warning_of_size_or_cut() -> None:
    found = find_in_mask(LIVER)
    assert not {"liver_volume", "liver_cut", "liver_hu_implausible"} & set(found)


def test_an_empty_mask_asks_for_the_part_of_the_body() -> None:
    grid = make_grid()
    mask = Volume(np.zeros(SHAPE, np.uint8), grid)
    (finding,) = check_mask(mask, Overview.from_scan(make_scan(grid=grid)), make_settings())
    assert finding.code == "liver_volume"
    assert "no liver was found" in finding.message


def test_a_liver_of_a_mouse_is_implausible() -> None:
    assert "liver_volume" in find_in_mask((slice(8, 10), slice(20, 23), slice(40, 43)))


def test_a_liver_at_the_end_of_the_scan_is_cut() -> None:
    assert "liver_cut" in find_in_mask((slice(0, 22), *LIVER[1:]))
    assert "liver_cut" in find_in_mask((slice(18, 40), *LIVER[1:]))


def test_a_liver_with_the_density_of_bone_is_implausible() -> None:
    assert "liver_hu_implausible" in find_in_mask(LIVER, value=700)


def test_the_overview_has_every_nth_voxel_of_scan_and_mask() -> None:
    shape = (20, 300, 400)
    grid = Grid(shape, np.diag([1.0, 1.0, 5.0, 1.0]))
    voxels = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    overview = Overview.from_scan(Volume(voxels, grid))
    assert overview.steps == (1, 2, 3)
    assert np.array_equal(overview.image.voxels, voxels[:, ::2, ::3])
    assert overview.image.spacing_mm == (5.0, 2.0, 3.0)
    mask = Volume((voxels % 7 == 0).astype(np.uint8), grid)
    assert np.array_equal(overview.subsample_mask(mask).voxels, mask.voxels[:, ::2, ::3])


def test_an_error_refuses_a_scan() -> None:
    assert is_refused([INFO, WARNING, ERROR])
    assert not is_refused([INFO, WARNING])


def test_records_keep_all_findings_and_show_those_that_matter() -> None:
    records = findings_to_json([INFO, WARNING, ERROR])
    assert [record["severity"] for record in records] == ["info", "warning", "error"]
    shown = select_warnings(records)
    assert [record["code"] for record in shown] == [WARNING.code, ERROR.code]
    assert join_warnings(records) == (
        "coarser_than_training: voxels of 9 mm | too_few_slices: 3 slices are too few"
    )


def test_lines_for_the_terminal_name_the_scan() -> None:
    lines = format_warnings("liver_1", findings_to_json([INFO, WARNING, ERROR]))
    assert lines == [
        "warning: liver_1: voxels of 9 mm",
        "warning: liver_1: segmented because of --force, although: 3 slices are too few",
    ]


def test_another_limit_of_the_audit_is_another_fingerprint() -> None:
    before = fingerprint_scan_checks(make_settings())
    changed = load_settings([], ["convert.cleaning.min_slices=9"])
    assert fingerprint_scan_checks(changed) != before
