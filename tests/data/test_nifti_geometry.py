"""The affine of headers whose fields are damaged, contradictory or not in mm.

References are nibabel and, where the two differ, SimpleITK (ITK's reader, which nnU-Net uses).
"""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from liverseg_dist.data.findings import ScanFileError
from liverseg_dist.data.io.nifti import ScanFile, read_nifti, read_scan_file

AFFINE = np.array([[-0.7, 0, 0, 100.0], [0, -0.7, 0, 120.0], [0, 0, 2.5, -300.0], [0, 0, 0, 1]])
ZEROS, NANS = [0.0] * 4, [np.nan] * 4
SIZES = [1, 0.7, 0.7, 2.5]


def write_scan(
    path: Path, qform: np.ndarray | None = AFFINE, code: int = 1, **fields: object
) -> Path:
    """A scan with both forms; `fields` replace header fields afterwards."""
    voxels = np.random.default_rng(0).integers(-1024, 2000, (7, 6, 5)).astype(np.int16)
    image = nib.Nifti1Image(voxels, AFFINE)
    image.set_sform(AFFINE, code=code)
    image.set_qform(qform, code=0 if qform is None else code)
    raw = bytearray(image.to_bytes())
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    for name, value in fields.items():
        if name == "pixdim":
            value = [*value, *[0.0] * (8 - len(value))]  # type: ignore[misc]
        header[name] = value
    path.write_bytes(header.binaryblock + raw[348:])
    return path


def codes(scan: ScanFile) -> list[str]:
    return [note.code for note in scan.notes]


@pytest.mark.parametrize(
    "sizes",
    [
        [0.0, 0.7, 2.5],
        [0.7, -0.7, 2.5],
        [-0.7, -0.7, -2.5],
        [np.nan, 0.7, 2.5],
        [np.inf] * 3,
        [0.0] * 3,
        [1e30] * 3,
    ],
    ids=["zero", "negative", "all negative", "NaN", "infinite", "zeros", "huge"],
)
def test_usable_sform_needs_no_pixdim(tmp_path: Path, sizes: list[float]) -> None:
    for qform in (None, AFFINE):  # with a qform code, the qform is unusable as well
        scan = read_scan_file(write_scan(tmp_path / "a.nii", qform, pixdim=[1, *sizes]))
        np.testing.assert_allclose(scan.volume.affine, AFFINE, atol=1e-5)
        assert "pixdim_unusable" in codes(scan)
        assert ("qform_unusable" in codes(scan)) == (qform is not None)
        assert all(note.severity == "warning" for note in scan.notes)


@pytest.mark.parametrize(
    "rows",
    [
        {"srow_x": ZEROS, "srow_y": ZEROS, "srow_z": ZEROS},
        {"srow_z": ZEROS},
        {"srow_y": NANS},
        {"srow_y": [-0.7, 0, 0, 100.0]},
        {"srow_x": [1e30, 0, 0, 0]},
        {"srow_x": [-700, 0, 0, 0]},
    ],
    ids=["zeros", "one row of zeros", "NaN", "singular", "huge", "700 mm"],
)
def test_unusable_sform_is_replaced_by_qform(tmp_path: Path, rows: dict[str, list[float]]) -> None:
    scan = read_scan_file(write_scan(tmp_path / "a.nii", **rows))
    np.testing.assert_allclose(scan.volume.affine, AFFINE, atol=1e-5)
    assert codes(scan) == ["sform_unusable"]
    assert "the qform is used" in scan.notes[0].message
    with pytest.raises(ScanFileError) as caught:
        read_nifti(write_scan(tmp_path / "b.nii", None, **rows))
    assert caught.value.code in ("header_affine", "header_spacing")


@pytest.mark.parametrize(
    "fields",
    [
        {"quatern_b": np.nan},
        {"quatern_b": 5.0},
        {"quatern_c": np.inf},
        {"qoffset_x": np.nan},
        {"qoffset_z": 1e30},
    ],
    ids=["NaN", "norm over 1", "infinite", "NaN offset", "far away"],
)
def test_unusable_qform_has_finding(tmp_path: Path, fields: dict[str, float]) -> None:
    scan = read_scan_file(write_scan(tmp_path / "a.nii", **fields))
    np.testing.assert_allclose(scan.volume.affine, AFFINE, atol=1e-5)
    assert codes(scan) == ["qform_unusable"]
    with pytest.raises(ScanFileError, match=r"sform: .*; qform: "):
        read_nifti(write_scan(tmp_path / "b.nii", srow_x=ZEROS, **fields))


def test_qform_handedness_zero_is_read_as_one(tmp_path: Path) -> None:
    """As NIfTI's reference library reads it. The qform is the only form here."""
    right_handed = np.diag([0.7, 0.7, 2.5, 1.0])
    path = write_scan(tmp_path / "a.nii", right_handed, sform_code=0, pixdim=[0, *SIZES[1:]])
    np.testing.assert_allclose(read_nifti(path).affine, right_handed, atol=1e-5)


def test_different_forms_finding_states_distance(tmp_path: Path) -> None:
    moved = AFFINE.copy()
    moved[2, 3] += 30
    scan = read_scan_file(write_scan(tmp_path / "a.nii", moved))
    assert codes(scan) == ["qform_sform_disagree"]
    assert "30.00 mm apart" in scan.notes[0].message
    mirrored = np.diag([-1.0, 1, 1, 1]) @ AFFINE
    scan = read_scan_file(write_scan(tmp_path / "b.nii", mirrored))
    assert "180.0 degrees" in scan.notes[0].message
    assert "the sform is used" in scan.notes[0].message


@pytest.mark.parametrize(("code", "per_mm"), [(1, 1e-3), (3, 1e3)], ids=["metres", "microns"])
@pytest.mark.parametrize("forms", ["both", "qform", "sform", "neither"])
def test_other_length_units_are_converted_to_mm(
    tmp_path: Path, code: int, per_mm: float, forms: str
) -> None:
    fields: dict[str, object] = {
        **{f"srow_{axis}": (AFFINE[n] * per_mm).tolist() for n, axis in enumerate("xyz")},
        **{f"qoffset_{axis}": AFFINE[n, 3] * per_mm for n, axis in enumerate("xyz")},
        "pixdim": [SIZES[0], *(np.array(SIZES[1:]) * per_mm).tolist()],
        "xyzt_units": code + 8,  # 8: time in seconds
    }
    if forms in ("qform", "neither"):
        fields["sform_code"] = 0
    if forms in ("sform", "neither"):
        fields["qform_code"] = 0
    path = write_scan(tmp_path / "a.nii", **fields)
    scan = read_scan_file(path)
    assert codes(scan)[0] == "unit_not_mm"
    np.testing.assert_allclose(scan.volume.spacing_mm, (2.5, 0.7, 0.7), rtol=1e-5)
    if forms != "neither":
        np.testing.assert_allclose(scan.volume.affine, AFFINE, atol=1e-3)
    assert read_nifti(path).grid == scan.volume.grid


@pytest.mark.parametrize(("code", "per_mm"), [(1, 1e-3), (3, 1e3), (0, 1), (2, 1)])
def test_units_equal_itk(tmp_path: Path, code: int, per_mm: float) -> None:
    itk = pytest.importorskip("SimpleITK")
    path = write_scan(
        tmp_path / "a.nii",
        **{f"srow_{axis}": (AFFINE[n] * per_mm).tolist() for n, axis in enumerate("xyz")},
        **{f"qoffset_{axis}": AFFINE[n, 3] * per_mm for n, axis in enumerate("xyz")},
        pixdim=[SIZES[0], *(np.array(SIZES[1:]) * per_mm).tolist()],
        xyzt_units=code,
    )
    image = itk.ReadImage(str(path))
    grid = read_nifti(path).grid
    np.testing.assert_allclose(image.GetSpacing(), grid.spacing_mm[::-1], rtol=1e-5)
    lps = np.array(image.GetOrigin())  # ITK's world is LPS, NIfTI's is RAS
    np.testing.assert_allclose(lps * [-1, -1, 1], grid.affine[:3, 3], atol=1e-3)


@pytest.mark.parametrize("code", [1, 3])
def test_implausible_unit_is_not_applied(tmp_path: Path, code: int) -> None:
    """The numbers are mm, but the code gives voxels of 0.7 m or 0.7 microns."""
    scan = read_scan_file(write_scan(tmp_path / "a.nii", xyzt_units=code))
    np.testing.assert_allclose(scan.volume.affine, AFFINE, atol=1e-5)
    assert codes(scan) == ["unit_implausible"]
    assert "read as mm" in scan.notes[0].message


@pytest.mark.parametrize(("code", "found"), [(0, []), (2, []), (10, []), (5, ["unit_undefined"])])
def test_unknown_and_undefined_units(tmp_path: Path, code: int, found: list[str]) -> None:
    assert codes(read_scan_file(write_scan(tmp_path / "a.nii", xyzt_units=code))) == found


def test_intercept_without_slope_has_finding(tmp_path: Path) -> None:
    for slope, inter, found in (
        (0, -1024, ["scaling_ignored"]),
        (np.nan, -1024, ["scaling_ignored"]),
        (0, 0, []),
        (np.nan, np.nan, []),
    ):
        path = write_scan(tmp_path / "a.nii", scl_slope=slope, scl_inter=inter)
        scan = read_scan_file(path)
        assert codes(scan) == found
        np.testing.assert_array_equal(scan.volume.voxels.T, nib.load(path).dataobj)


def test_label_geometry_follows_same_rules(tmp_path: Path) -> None:
    path = write_scan(tmp_path / "a.nii", srow_x=ZEROS, srow_y=ZEROS, srow_z=ZEROS)
    raw = bytearray(path.read_bytes())
    raw[352:] = bytes(len(raw) - 352)
    path.write_bytes(raw)
    label = read_scan_file(path, "label")
    np.testing.assert_allclose(label.volume.affine, AFFINE, atol=1e-5)
    assert codes(label) == ["sform_unusable"]
