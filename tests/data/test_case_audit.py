"""The audit reports each defect by a stable code, and repairs a label only if that is safe."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from liverseg_dist.config import CleaningConfig
from liverseg_dist.data.audit.case_audit import AuditResult, audit_case
from liverseg_dist.data.audit.duplicates import (
    find_duplicates,
    find_ircadb_overlaps,
    hash_voxels,
    report_duplicates,
    report_ircadb_overlaps,
)
from liverseg_dist.data.audit.label_checks import count_detached_lesions
from liverseg_dist.data.findings import Finding
from liverseg_dist.data.io.dataset_index import read_dataset
from liverseg_dist.data.io.nifti import read_scan_file
from liverseg_dist.data.io.spacing_table import read_spacing_table, replace_spacing
from liverseg_dist.errors import UserError
from liverseg_dist.labels import LITS_SCHEME
from liverseg_dist.volume import Grid, Volume
from tests.data.geometry import ALL_ORIENTATIONS

SHAPE = (70, 40, 48)
GRID = Grid(SHAPE, np.array([[-6.0, 0, 0, 90], [0, -6.0, 0, 80], [0, 0, 4.0, -400], [0, 0, 0, 1]]))


def case() -> tuple[Volume, Volume]:
    """A body in air with a liver of about 470 ml that holds two tumours."""
    z, y, x = np.indices(SHAPE)
    body = ((y - 20) / 17) ** 2 + ((x - 24) / 21) ** 2 <= 1
    liver = ((z - 40) / 14) ** 2 + ((y - 18) / 8) ** 2 + ((x - 16) / 7) ** 2 <= 1
    label = liver.astype(np.uint8)
    label[38:42, 16:19, 14:17] = 2
    label[45:47, 20:22, 15:17] = 2
    hu = np.where(body, 40, -1000)
    hu[liver] = 110
    hu[label == 2] = 60
    noise = np.random.default_rng(0).normal(0, 5, SHAPE)
    return Volume((hu + noise).round().astype(np.int16), GRID), Volume(label, GRID)


def audit(image: Volume, label: Volume | None, **options: object) -> AuditResult:
    return audit_case(image, label, CleaningConfig(), **options)  # type: ignore[arg-type]


def codes(result: AuditResult) -> dict[str, str]:
    return {finding.code: finding.severity for finding in result.findings}


def test_good_case_has_no_findings() -> None:
    image, label = case()
    result = audit(image, label)
    assert result.status == "kept"
    assert result.findings == ()
    assert result.label is not None
    np.testing.assert_array_equal(result.label.voxels, label.voxels)
    assert result.facts["class_voxels"] == np.bincount(label.voxels.reshape(-1)).tolist()
    assert result.facts["tumours"] == 2
    assert result.facts["orientation"] == "LPS"
    assert result.facts["volumes_ml"]["liver"] == pytest.approx((label.voxels == 1).sum() * 0.144)  # type: ignore[index]
    assert result.facts["hu_range"] == [image.voxels.min(), image.voxels.max()]
    assert result.facts["liver_median_hu"] == pytest.approx(110, abs=1)
    json.dumps(result.facts, allow_nan=False)


# --- geometry of the label -----------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [o for o in ALL_ORIENTATIONS if o != "LPS"][::6])
def test_label_in_another_orientation_is_reoriented(orientation: str) -> None:
    image, label = case()
    result = audit(image, label.reoriented(orientation))
    assert result.status == "repaired"
    assert codes(result) == {"label_reoriented": "warning"}
    assert result.label is not None
    assert result.label.grid == image.grid
    np.testing.assert_array_equal(result.label.voxels, label.voxels)


def test_label_on_finer_grid_is_resampled_with_finding() -> None:
    image, label = case()
    fine = label.grid.with_spacing((2, 3, 3)).cropped((10, 5, 5), (110, 70, 80))
    zoomed = Volume(label.voxels.repeat(2, 0).repeat(2, 1).repeat(2, 2)[10:120, 5:75, 5:85], fine)
    result = audit(image, zoomed)
    assert result.status == "repaired"
    assert codes(result) == {"label_resampled": "warning"}
    assert result.label is not None
    np.testing.assert_array_equal(result.label.voxels, label.voxels)
    message = result.findings[0].message
    assert "110 x 70 x 80" in message
    assert "ml before" in message


def test_label_on_tilted_grid_is_resampled() -> None:
    image, label = case()
    affine = GRID.affine.copy()
    affine[:3, :3] = Rotation.from_euler("y", 10, degrees=True).as_matrix() @ affine[:3, :3]
    affine[:3, 3] += GRID.world_mm(np.array([40, 18, 16])) - Grid(SHAPE, affine).world_mm(
        np.array([40, 18, 16])
    )
    tilted = Volume(label.voxels, Grid(SHAPE, affine))
    result = audit(image, tilted)
    assert "label_resampled" in codes(result)
    assert result.label is not None
    dice = (
        2
        * ((result.label.voxels > 0) & (label.voxels > 0)).sum()
        / ((result.label.voxels > 0).sum() + (label.voxels > 0).sum())
    )
    assert 0.7 < dice < 1


def test_label_without_overlap_excludes_case() -> None:
    image, label = case()
    affine = GRID.affine.copy()
    affine[:3, 3] += 5000
    result = audit(image, Volume(label.voxels, Grid(SHAPE, affine)))
    assert result.status == "excluded"
    assert codes(result) == {"label_no_overlap": "error"}
    assert result.label is None


def test_cut_label_has_finding() -> None:
    image, label = case()
    result = audit(image.cropped((0, 0, 0), (40, 40, 48)), label)
    assert codes(result)["label_resampled"] == "warning"
    assert codes(result)["label_cut"] == "warning"


def test_label_with_lost_header_uses_image_grid() -> None:
    image, label = case()
    result = audit(image, Volume(label.voxels, Grid(SHAPE, np.eye(4))))
    assert result.status == "repaired"
    assert codes(result) == {"label_header_lost": "warning"}
    assert result.label is not None
    assert result.label.grid == image.grid


def test_shift_below_half_voxel_uses_image_grid() -> None:
    image, label = case()
    affine = GRID.affine.copy()
    affine[0, 3] += 1.2
    result = audit(image, Volume(label.voxels, Grid(SHAPE, affine)))
    assert codes(result) == {"label_shifted": "warning"}
    assert result.label is not None
    np.testing.assert_array_equal(result.label.voxels, label.voxels)


# --- label values --------------------------------------------------------------------------------


def changed(change: Callable[[np.ndarray], None], dtype: type = np.uint8) -> Volume:
    _, label = case()
    voxels = label.voxels.astype(dtype)
    change(voxels)
    return label.with_voxels(voxels)


def test_unknown_label_values_exclude_case() -> None:
    def damage(voxels: np.ndarray) -> None:
        voxels[0, 0, :3] = 3, 3, 7

    result = audit(case()[0], changed(damage))
    assert result.status == "excluded"
    assert codes(result) == {"label_values": "error"}
    assert "3 (2 voxels), 7 (1 voxels)" in result.findings[0].message


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_fractional_label_excludes_case(value: float) -> None:
    def damage(voxels: np.ndarray) -> None:
        voxels[0, 0, 0] = value

    result = audit(case()[0], changed(damage, np.float32))
    assert codes(result) == {"label_fractional": "error"}
    assert result.status == "excluded"


def test_integer_valued_float_label_is_kept() -> None:
    result = audit(case()[0], changed(lambda voxels: None, np.float32))
    assert result.status == "kept"
    assert result.label is not None
    assert result.label.voxels.dtype == np.uint8


def test_empty_label_excludes_case() -> None:
    def erase(voxels: np.ndarray) -> None:
        voxels[:] = 0

    assert codes(audit(case()[0], changed(erase))) == {"label_empty": "error"}


def test_label_without_tumour_is_info() -> None:
    def remove_tumours(voxels: np.ndarray) -> None:
        voxels[voxels == 2] = 1

    result = audit(case()[0], changed(remove_tumours))
    assert codes(result) == {"no_tumour": "info"}
    assert result.status == "kept"
    assert result.facts["tumours"] == 0


def test_tumour_outside_liver_is_warning() -> None:
    def add_detached_tumour(voxels: np.ndarray) -> None:
        voxels[5:7, 30:33, 30:32] = 2

    result = audit(case()[0], changed(add_detached_tumour))
    assert codes(result) == {"tumour_outside_liver": "warning"}
    assert "1 of 3 tumours (12 voxels)" in result.findings[0].message


def test_detached_tumours_equal_scipy_dilation() -> None:
    """A tumour is detached if its 26-neighbourhood holds no liver."""
    rng = np.random.default_rng(0)
    for density in (0.005, 0.02, 0.1):
        label = rng.choice(3, (14, 15, 16), p=[1 - 2 * density, density, density]).astype(np.uint8)
        cube = np.ones((3, 3, 3))
        pieces, count = ndimage.label(label == 2, structure=cube)
        near = ndimage.binary_dilation(label == 1, structure=cube)
        detached = [n for n in range(1, count + 1) if not near[pieces == n].any()]
        voxels = sum(int((pieces == n).sum()) for n in detached)
        found = count_detached_lesions(label, LITS_SCHEME, LITS_SCHEME.lesions[0])
        assert found == (count, len(detached), voxels)


def test_implausible_liver_volume_is_warning() -> None:
    image, label = case()
    small = Grid(SHAPE, GRID.affine @ np.diag([0.3, 0.3, 0.3, 1]))
    result = audit(Volume(image.voxels, small), Volume(label.voxels, small))
    assert codes(result) == {"liver_volume": "warning"}


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "PIR"])
def test_flipped_affine_puts_liver_on_left(orientation: str) -> None:
    """In any orientation the side of the liver follows the affine: right, with x negated left."""
    image, label = (volume.reoriented(orientation) for volume in case())
    kept = audit(image, label)
    assert codes(kept) == {}
    assert kept.facts["liver_right_of_middle_mm"] == pytest.approx(48, abs=6)
    flipped = Grid(image.shape, np.diag([-1.0, 1, 1, 1]) @ image.grid.affine)
    result = audit(Volume(image.voxels, flipped), Volume(label.voxels, flipped))
    assert codes(result) == {"liver_on_the_left": "warning"}
    assert "mm to the left" in result.findings[0].message
    assert result.status == "kept"


# --- missing labels ------------------------------------------------------------------------------


def test_missing_label_follows_policy() -> None:
    image, _ = case()
    named = (
        Finding(
            "warning", "label_missing", "dataset.json names labelsTr/x.nii.gz, which does not exist"
        ),
    )
    out = audit_case(image, None, CleaningConfig(), named)
    assert (out.status, codes(out)) == ("excluded", {"label_missing": "error"})
    assert "labelsTr/x.nii.gz" in out.findings[0].message
    kept = audit_case(image, None, CleaningConfig(missing_label="unlabelled"), named)
    assert (kept.status, codes(kept)) == ("unlabelled", {"label_missing": "info"})
    test = audit_case(image, None, CleaningConfig(), training=False)
    assert (test.status, test.findings) == ("unlabelled", ())


# --- the image -----------------------------------------------------------------------------------


def test_lost_header_of_image_and_label() -> None:
    image, label = case()
    lost_grid = Grid(SHAPE, np.diag([-1.0, -1, 1, 1]))
    result = audit(Volume(image.voxels, lost_grid), Volume(label.voxels, lost_grid))
    assert codes(result) == {"identity_affine": "warning", "liver_volume": "warning"}
    assert "spacing_table" in result.findings[0].message


@pytest.mark.parametrize(
    ("slices", "code"), [(3, "very_few_slices"), (20, "few_slices"), (63, "few_slices"), (64, None)]
)
def test_few_slices_finding(slices: int, code: str | None) -> None:
    image, label = case()
    found = codes(
        audit(*(v.cropped((5, 0, 0), (slices, 40, 48)).reoriented("SPL") for v in (image, label)))
    )
    assert [c for c in found if "slices" in c] == ([code] if code else [])


@pytest.mark.parametrize(
    ("slices", "settings", "severity"),
    [
        (3, {}, "error"),
        (4, {}, "warning"),
        (7, {}, "warning"),
        (3, {"min_slices": 3}, "warning"),
        (8, {"min_slices": 9}, "error"),
        # 28 mm are two slices of 12 mm.
        (7, {"spacing_mm": (12.0, 6.0, 6.0)}, "error"),
        # Resampling to thinner slices adds no measured slice.
        (3, {"spacing_mm": (1.0, 1.0, 1.0)}, "error"),
    ],
)
def test_too_few_slices_exclude_case(slices: int, settings: dict[str, Any], severity: str) -> None:
    image, label = (v.cropped((35, 0, 0), (slices, 40, 48)) for v in case())
    result = audit_case(image, label, CleaningConfig(**settings))
    assert codes(result)["very_few_slices"] == severity
    assert (result.status == "excluded") == (severity == "error")
    if severity == "error":
        assert "convert.cleaning.min_slices" in next(
            f.message for f in result.findings if f.code == "very_few_slices"
        )


@pytest.mark.parametrize(
    ("factor", "is_reported"),
    [
        ((0.1, 0.1, 0.1), True),
        ((1, 1, 1), False),
        ((0.5, 1, 1), True),
        ((10, 10, 10), True),
        ((1, 1, 6), True),
    ],
    ids=["cm", "mm", "narrow", "10 times", "thick"],
)
def test_implausible_voxel_sizes(factor: tuple[float, float, float], is_reported: bool) -> None:
    """`factor` scales x, y, z. The scan is 288 x 240 x 280 mm with voxels of 6 x 6 x 4 mm."""
    image, label = case()
    if factor == (0.5, 1, 1):  # 60 mm wide remain of 288
        image, label = (v.cropped((0, 0, 8), (70, 40, 19)) for v in (image, label))
    grid = Grid(image.shape, image.affine @ np.diag([*factor, 1]))
    result = audit(Volume(image.voxels, grid), Volume(label.voxels, grid))
    assert ("implausible_voxel_size" in codes(result)) == is_reported
    assert result.status == "kept"


def test_oblique_scan_is_info() -> None:
    image, label = case()
    affine = GRID.affine.copy()
    affine[:3, :3] = Rotation.from_euler("x", 12, degrees=True).as_matrix() @ affine[:3, :3]
    tilted = Grid(SHAPE, affine)
    result = audit(Volume(image.voxels, tilted), Volume(label.voxels, tilted))
    assert codes(result) == {"oblique": "info"}
    assert "12.0 degrees" in result.findings[0].message


def test_broken_voxels_are_counted_and_too_many_exclude_case() -> None:
    image, label = case()
    voxels = image.voxels.astype(np.float32)
    voxels[0, 10, :7] = np.nan
    voxels[:, :3, :10] = -3024
    voxels[20] = -1024
    result = audit(image.with_voxels(voxels), label)
    assert codes(result) == {
        "broken_voxels": "warning",
        "padding_values": "warning",
        "blank_slices": "warning",
    }
    assert result.status == "kept"
    assert result.facts["broken"] == {
        "nonfinite_voxels": 7,
        "padding_voxels": 69 * 30,
        "saturated_voxels": 0,
        "blank_slices": [20],
    }
    voxels[21:30] = np.nan
    result = audit(image.with_voxels(voxels), label)
    assert result.status == "excluded"
    assert codes(result)["too_many_broken_voxels"] == "error"


def scaled(factor: float, offset: float) -> Volume:
    image, _ = case()
    return image.with_voxels((image.voxels * factor + offset).astype(np.float32))


def convert_to_grey(low: int, high: int, lowest: int = 0) -> Volume:
    """Grey values of 8 bits, as in a PNG or a screenshot of a window."""
    image, _ = case()
    grey = np.clip((image.voxels.astype(float) - low) / (high - low), 0, 1) * 255 + lowest
    return image.with_voxels(grey.round().astype(np.int16))


def with_padding(image: Volume, value: float) -> Volume:
    """As some scanners mark voxels outside their field of view."""
    voxels = image.voxels.copy()
    voxels[:, :4, :4] = value
    return image.with_voxels(voxels)


def with_overshoot(image: Volume) -> Volume:
    """A few negative voxels, as cubic resampling leaves."""
    voxels = image.voxels.copy()
    voxels[::10, 5, 5] = -400
    return image.with_voxels(voxels)


@pytest.mark.parametrize("window", [(-160, 240), (-100, 250), (-17, 201), (-200, 300)])
def test_windowed_hu_is_accepted(window: tuple[int, int]) -> None:
    image, label = case()
    cut = image.with_voxels(np.clip(image.voxels, *window))
    assert codes(audit(cut, label)) == codes(audit(cut, None, training=False)) == {}


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    ("image", "code"),
    [
        (scaled(1, 1024), "hu_offset_missing"),
        (scaled(1, 1000), "hu_offset_missing"),
        (scaled(0.1, 300), "not_ct_like"),
        (scaled(1 / 1200, 1000 / 1200), "not_ct_like"),
        (scaled(0.5, 500), "not_ct_like"),
        (convert_to_grey(-160, 240), "not_ct_like"),
        (convert_to_grey(-1000, 1000), "not_ct_like"),
        (convert_to_grey(-160, 100, -128), "not_ct_like"),
        (with_padding(scaled(1, 1024), -2000), "hu_offset_missing"),
        (scaled(10, 0), "not_ct_like"),
        (with_overshoot(scaled(0.2, 200)), "not_ct_like"),
    ],
    ids=[
        "1024",
        "1000",
        "squeezed",
        "unit range",
        "MR-like",
        "8-bit window",
        "8-bit range",
        "8-bit with a sign",
        "1024 and padding",
        "ten times",
        "MR-like, resampled",
    ],
)
def test_values_that_are_not_hu_exclude_case(image: Volume, code: str, labelled: bool) -> None:
    result = audit(image, case()[1] if labelled else None, training=labelled)
    assert result.status == "excluded"
    assert [found for found, severity in codes(result).items() if severity == "error"] == [code]


def test_soft_tissue_crop_is_accepted() -> None:
    """Without air in the image, values above zero do not indicate a lost offset."""
    image, label = case()
    inner = [v.cropped((0, 14, 10), (70, 10, 14)) for v in (image, label)]
    assert inner[0].voxels.min() > 0
    assert codes(audit(*inner)) == {}


def test_label_of_another_image_is_warning() -> None:
    image, label = case()
    moved = label.with_voxels(np.roll(label.voxels, 22, axis=1))
    assert codes(audit(image, moved)) == {"liver_hu_implausible": "warning"}


def test_constant_or_empty_image_is_error() -> None:
    _, label = case()
    result = audit(Volume(np.full(SHAPE, 7, np.int16), GRID), label)
    assert codes(result) == {"constant_image": "error"}
    nothing = audit(Volume(np.full(SHAPE, np.nan, np.float32), GRID), label)
    assert codes(nothing)["too_many_broken_voxels"] == "error"


# --- checks over all scans -----------------------------------------------------------------------


def test_duplicates_are_found_by_voxels() -> None:
    image, _ = case()
    other = image.with_voxels(image.voxels + np.int16(1))
    hashes = {
        "c": hash_voxels(image),
        "b": hash_voxels(other),
        "a": hash_voxels(image.reoriented("PSR")),
        "d": hash_voxels(Volume(image.voxels, replace_spacing(GRID, (1, 1, 1)))),
    }
    assert find_duplicates(hashes) == [("a", "c", "d")]
    found = report_duplicates(find_duplicates(hashes))
    assert set(found) == {"a", "c", "d"}
    assert "c, d" in found["a"].message


def test_duplicate_finding_names_limited_number() -> None:
    group = tuple(f"liver_{n:04d}" for n in range(3000))
    found = report_duplicates([group])
    assert found["liver_0002"].message.startswith(
        "same voxels as liver_0000, liver_0001, liver_0003, "
    )
    assert "liver_0010 and 2989 more;" in found["liver_0002"].message


@pytest.mark.parametrize(
    "name",
    [
        "3Dircadb1.5",
        "3D-IRCADb-01-05",
        "ircadb_5",
        "IRCAD case 5",
        "ircad-05",
        "3Dircadb1_patient5",
    ],
)
def test_ircadb_names(name: str) -> None:
    assert find_ircadb_overlaps([name, "liver_32", "liver_5"]) == [(name, "liver_32")]
    assert set(report_ircadb_overlaps([name, "volume-32"])) == {name, "volume-32"}


def test_ircadb_without_overlap() -> None:
    assert find_ircadb_overlaps(["ircadb_5", "liver_31", "ircadb_21", "liver_48", "liver_28"]) == []


def test_spacing_table_replaces_lost_spacing(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("case,z_mm,y_mm,x_mm\nliver_28,1.6,0.57,0.57\n")
    (tmp_path / "t.yaml").write_text("liver_28: [1.6, 0.57, 0.57]\n")
    for name in ("t.csv", "t.yaml"):
        table = read_spacing_table(tmp_path / name)
        assert table == {"liver_28": (1.6, 0.57, 0.57)}
    lost = Grid(SHAPE, np.array([[-1.0, 0, 0, 5], [0, 1, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]]))
    repaired = replace_spacing(lost, table["liver_28"])
    np.testing.assert_allclose(repaired.spacing_mm, (1.6, 0.57, 0.57))
    assert repaired.orientation == lost.orientation
    np.testing.assert_array_equal(repaired.affine[:3, 3], lost.affine[:3, 3])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "case,z,y,x\na,1,1,1\n", "column z_mm is missing"),
        ("t.csv", "case,z_mm,y_mm,x_mm\na,1,zwei,1\n", "a has '1, zwei, 1'"),
        ("t.csv", "case,z_mm,y_mm,x_mm\na,1,0,1\n", "a has"),
        ("t.csv", "case,z_mm,y_mm,x_mm\na,1,nan,1\n", "a has"),
        ("t.csv", "case,z_mm,y_mm,x_mm\na,1\n", "a has"),
        ("t.yaml", "a: [1, 2]\n", "a has"),
        ("t.yaml", "- 1\n", "not a spacing table"),
        ("t.yaml", "a: [1, 2\n", "not a spacing table"),
    ],
)
def test_invalid_spacing_table_is_user_error(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_spacing_table(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    with pytest.raises(UserError, match="no such file"):
        read_spacing_table(tmp_path / "none.csv")


@pytest.mark.real_mini
def test_real_scans_have_expected_findings(real_mini: Path) -> None:
    """The audit reports the defects that the folder's README lists for each scan."""
    found = {}
    dataset = read_dataset(real_mini)
    for item in (*dataset.training, *dataset.test):
        image = read_scan_file(item.image)
        label = read_scan_file(item.label, "label") if item.label else None
        notes = (*item.findings, *image.notes, *(label.notes if label else ()))
        training = item in dataset.training
        result = audit_case(
            image.volume,
            label.volume if label else None,
            CleaningConfig(),
            notes,
            training=training,
        )
        found[item.case_id] = (
            result.status,
            sorted(f.code for f in result.findings if f.code != "padding_values"),
        )
        if item.case_id == "liver_28":
            assert result.facts["class_voxels"] == [30_951_445, 2_650_863, 214_268]
            assert result.facts["tumours"] == 7
        if item.case_id == "liver_902":
            assert any(
                f.code == "padding_values" and f.severity == "warning" for f in result.findings
            )
    assert found == {
        "liver_28": ("kept", []),
        "liver_900": ("kept", ["no_tumour"]),
        "liver_901": ("repaired", ["few_slices", "label_reoriented", "no_tumour"]),
        "liver_902": ("excluded", ["liver_volume", "no_tumour", "very_few_slices"]),
        "liver_903": ("excluded", ["few_slices", "label_missing"]),
        "liver_950": ("unlabelled", ["few_slices"]),
    }
