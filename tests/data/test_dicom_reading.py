"""The DICOM reader: every way in which scanners write a series gives the scan, or one line why not."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK

from liverseg_dist.data.findings import ScanFileError
from liverseg_dist.data.io.dicom_series import DicomScan, list_source_stacks, read_dicom_scan
from liverseg_dist.data.io.nifti import ScanFile
from liverseg_dist.phantom.dicom_series import SeriesOptions, build_series, write_series
from liverseg_dist.volume import Grid, Volume
from tests.data.dicom_sources import (
    balls,
    compress,
    encode,
    fresh_uids,
    make_grid,
    make_scan,
    reverse_numbers,
    shuffle,
    write_scan,
)

LIMIT_MM = 0.3


def read(*paths: Path, **options: Any) -> ScanFile:
    return read_dicom_scan(DicomScan(paths, "scan_x", **options))


def codes(file: ScanFile) -> set[str]:
    return {finding.code for finding in file.notes}


def assert_same(file: ScanFile, scan: Volume) -> None:
    """Equal voxels at equal places, in whatever order the axes are."""
    expected = scan.reoriented(file.volume.grid.orientation)
    assert file.volume.grid.matches(expected.grid, 0.01)
    assert file.volume.voxels.dtype == np.int16
    np.testing.assert_array_equal(file.volume.voxels, expected.voxels)


def refusal(*paths: Path, **options: Any) -> ScanFileError:
    with pytest.raises(ScanFileError) as caught:
        read(*paths, **options)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "orientation", ["axial", "feet_first", "prone", "sagittal", "coronal", "oblique", "tilted"]
)
def test_every_orientation_is_read(tmp_path: Path, orientation: str) -> None:
    scan = make_scan(make_grid(orientation))
    folder = write_scan(tmp_path / "s", scan, reverse_numbers)
    shuffle(folder)
    file = read(folder)
    assert_same(file, scan)
    assert codes(file) == ({"sheared"} if orientation == "tilted" else set())
    assert file.modality == "CT"


@pytest.mark.parametrize("orientation", ["axial", "oblique", "tilted"])
def test_the_balls_are_at_their_places(tmp_path: Path, orientation: str) -> None:
    """By centroid in the world, not by the affine that the series was written with."""
    grid = make_grid(orientation)
    volume = read(write_scan(tmp_path / "s", make_scan(grid))).volume
    middle = grid.world_mm((np.array(grid.shape) - 1) / 2)
    for offset, _, hu in balls(grid):
        centre = volume.grid.world_mm(np.argwhere(volume.voxels == hu)).mean(axis=0)
        assert np.linalg.norm(centre - middle - offset) < LIMIT_MM


@pytest.mark.parametrize("orientation", ["axial", "sagittal", "oblique", "feet_first"])
def test_simpleitk_reads_the_same(tmp_path: Path, orientation: str) -> None:
    """SimpleITK's GDCM reader is independent of pydicom."""
    folder = write_scan(tmp_path / "s", make_scan(make_grid(orientation)))
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    affine = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    affine[:3, :3] = direction * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    voxels = SimpleITK.GetArrayFromImage(image).astype(np.int16)
    reference = Volume(voxels, Grid(voxels.shape, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine))
    assert_same(read(folder), reference)


@pytest.mark.parametrize("syntax", ["j2k", "jpegls", "rle", "jpeg70", "jpeg57"])
@pytest.mark.parametrize("is_signed", [False, True])
def test_compressed_series_are_read(tmp_path: Path, syntax: str, is_signed: bool) -> None:
    scan = make_scan()
    intercept = 0.0 if is_signed else -1024.0
    folder = write_scan(tmp_path / "s", scan, is_signed=is_signed, intercept=intercept)
    compress(folder, syntax)
    used = {pydicom.dcmread(file).file_meta.TransferSyntaxUID for file in folder.iterdir()}
    assert all(uid.is_compressed for uid in used)
    assert_same(read(folder), scan)


@pytest.mark.parametrize("syntax", ["implicit", "big", "deflated", "bare"])
def test_other_encodings_are_read(tmp_path: Path, syntax: str) -> None:
    scan = make_scan()
    folder = write_scan(tmp_path / "s", scan)
    encode(folder, syntax)
    assert_same(read(folder), scan)


def test_rescaling_is_that_of_each_slice(tmp_path: Path) -> None:
    scan = make_scan()

    def rescale(datasets: list[Any]) -> None:
        for number, dataset in enumerate(datasets):
            stored = np.frombuffer(dataset.PixelData, "<u2").astype(int)
            # The same HU by another offset, stored at half the values in every other slice.
            dataset.RescaleIntercept = str(-1024 - 7 * number)
            dataset.PixelData = (stored + 7 * number).astype("<u2").tobytes()

    assert_same(read(write_scan(tmp_path / "s", scan, rescale)), scan)


def test_slopes_that_are_no_integers_give_floats(tmp_path: Path) -> None:
    scan = make_scan()
    folder = write_scan(tmp_path / "s", scan, slope=0.5, is_signed=True, intercept=10.25)
    file = read(folder)
    assert file.volume.voxels.dtype == np.float32
    difference = file.volume.voxels - scan.reoriented(file.volume.grid.orientation).voxels
    assert np.abs(difference).max() <= 0.25


def test_unsigned_values_above_int16_are_kept(tmp_path: Path) -> None:
    scan = make_scan()
    wide = Volume(scan.voxels.astype(np.int32) + 50_000, scan.grid)
    file = read(write_scan(tmp_path / "s", wide, modality="MR"))
    assert file.modality == "MR"
    expected = wide.reoriented(file.volume.grid.orientation).voxels
    np.testing.assert_array_equal(file.volume.voxels, expected.astype(np.float32))


def test_bits_beyond_the_stored_ones_are_ignored(tmp_path: Path) -> None:
    """Old files keep an overlay in the upper four bits."""
    scan = make_scan()

    def add_overlay(datasets: list[Any]) -> None:
        for dataset in datasets:
            dataset.BitsStored, dataset.HighBit = 12, 11
            stored = np.frombuffer(dataset.PixelData, "<u2") | np.uint16(0x3000)
            dataset.PixelData = stored.astype("<u2").tobytes()

    assert_same(read(write_scan(tmp_path / "s", scan, add_overlay)), scan)


def test_jitter_of_positions_is_accepted(tmp_path: Path) -> None:
    scan = make_scan()
    rng = np.random.default_rng(1)

    def move(datasets: list[Any]) -> None:
        for dataset in datasets:
            moved = np.array(dataset.ImagePositionPatient, dtype=float) + rng.normal(0, 0.03, 3)
            dataset.ImagePositionPatient = [f"{one:.4f}" for one in moved]

    file = read(write_scan(tmp_path / "s", scan, move))
    expected = scan.reoriented(file.volume.grid.orientation)
    assert file.volume.grid.matches(expected.grid, LIMIT_MM)
    np.testing.assert_array_equal(file.volume.voxels, expected.voxels)


def drop(*numbers: int) -> Callable[[list[Any]], None]:
    def change(datasets: list[Any]) -> None:
        for number in sorted(numbers, reverse=True):
            del datasets[number]

    return change


def test_missing_slices_are_refused_with_their_places(tmp_path: Path) -> None:
    scan = make_scan()
    folder = write_scan(tmp_path / "s", scan, drop(10, 11, 17))
    error = refusal(folder)
    assert error.code == "dicom_gap"
    z = [scan.grid.world_mm(np.array([k, 0, 0]))[2] for k in (9, 12, 16, 18)]
    assert f"3 slice(s) of 3 mm are missing, between {z[0]:.2f} and {z[1]:.2f} mm" in str(error)
    assert f"{z[2]:.2f} and {z[3]:.2f} mm" in str(error)
    assert "--fill-gaps" in str(error)


@pytest.mark.parametrize("orientation", ["axial", "tilted"])
def test_missing_slices_are_interpolated_on_request(tmp_path: Path, orientation: str) -> None:
    scan = make_scan(make_grid(orientation))
    folder = write_scan(tmp_path / "s", scan, drop(10, 11, 17))
    file = read(folder, fill_gaps=True)
    assert "slices_interpolated" in codes(file)
    volume = file.volume.reoriented(scan.grid.orientation)
    assert volume.grid.matches(scan.grid, 0.01)
    there = [k for k in range(scan.shape[0]) if k not in (10, 11, 17)]
    np.testing.assert_array_equal(volume.voxels[there], scan.voxels[there])
    before, after = scan.voxels[9].astype(float), scan.voxels[12].astype(float)
    np.testing.assert_allclose(volume.voxels[10], before * 2 / 3 + after / 3, atol=0.51)


def test_varying_distances_are_refused(tmp_path: Path) -> None:
    def move(datasets: list[Any]) -> None:
        for number, dataset in enumerate(datasets[12:], start=1):
            x, y, z = map(float, dataset.ImagePositionPatient)
            dataset.ImagePositionPatient = [x, y, z + 1.2 * number]

    folder = write_scan(tmp_path / "s", make_scan(), move)
    assert "the distance of the slices varies from 3 to 4.2 mm" in str(refusal(folder))


def test_a_missing_thin_slice_is_noticed(tmp_path: Path) -> None:
    """Its gap is smaller than the tolerance of positions."""
    grid = make_grid()
    affine = grid.affine.copy()
    affine[:3, 2] /= 6
    folder = write_scan(tmp_path / "s", make_scan(Grid(grid.shape, affine)), drop(11))
    assert refusal(folder).code == "dicom_gap"


def test_copies_of_images_are_dropped_and_different_ones_refused(tmp_path: Path) -> None:
    scan = make_scan()
    folder = write_scan(tmp_path / "s", scan)
    copies = build_series(scan, SeriesOptions("s"))[4:9]
    fresh_uids(copies)
    write_series(folder / "again", copies)
    file = read(folder)
    assert_same(file, scan)
    assert codes(file) == {"dicom_repeated"}
    for dataset in copies:
        dataset.PixelData = dataset.PixelData[:-2] + b"\0\0"
    write_series(folder / "again", copies)
    assert refusal(folder).code == "dicom_repeated"


def test_localizers_and_other_objects_are_ignored(tmp_path: Path) -> None:
    scan = make_scan()
    folder = write_scan(tmp_path / "s", scan)

    def localizer(datasets: list[Any]) -> None:
        for dataset in datasets:
            dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    write_scan(tmp_path / "s" / "scout", make_scan(make_grid("coronal", (4, 30, 30))), localizer)
    (folder / "README.txt").write_text("hello")
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(20))
    file = read(folder)
    assert_same(file, scan)
    assert refusal(folder / "scout").code == "dicom_no_images"
    assert refusal(folder / "README.txt").code == "dicom_none"


def two_series(folder: Path) -> tuple[Volume, Volume]:
    one, two = make_scan(seed=1), make_scan(make_grid("oblique"), seed=2)
    write_scan(folder / "a", one, patient="p", number=3, description="arterial")
    write_scan(folder / "b", two, patient="p", number=4, description="Portal venous")
    return one, two


def test_several_series_are_listed_and_can_be_selected(tmp_path: Path) -> None:
    one, two = two_series(tmp_path / "s")
    error = refusal(tmp_path / "s")
    assert error.code == "dicom_ambiguous"
    assert "series 3: CT, 24 slices of 44 x 36, 0.8 x 1 x 3 mm, axial" in str(error)
    assert "series 4: CT" in str(error)
    assert "arterial" not in str(error)
    uid = str(pydicom.dcmread(next((tmp_path / "s" / "b").iterdir())).SeriesInstanceUID)
    for selection in ("4", "portal", uid, uid[-8:]):
        assert_same(read(tmp_path / "s", series=selection), two)
    assert_same(read(tmp_path / "s", series="3"), one)
    assert "fits none of the 2 series" in str(refusal(tmp_path / "s", series="9"))


def test_a_derived_series_gives_way_to_the_original(tmp_path: Path) -> None:
    scan = make_scan()
    write_scan(tmp_path / "s" / "a", scan, patient="p", number=3)

    def derive(datasets: list[Any]) -> None:
        for dataset in datasets:
            dataset.ImageType = ["DERIVED", "SECONDARY", "REFORMATTED"]

    write_scan(tmp_path / "s" / "b", make_scan(make_grid("coronal")), derive, number=4)
    file = read(tmp_path / "s")
    assert_same(file, scan)
    assert codes(file) == {"dicom_series"}


def test_echoes_of_one_series_are_told_apart(tmp_path: Path) -> None:
    scans = [make_scan(seed=seed) for seed in (1, 2)]
    positive = [Volume(scan.voxels + 1000, scan.grid) for scan in scans]
    for number, scan in enumerate(positive):

        def set_echo(datasets: list[Any], number: int = number) -> None:
            for dataset in datasets:
                dataset.EchoTime = str(2.3 * (number + 1))
                dataset.SeriesInstanceUID = "1.2.3.4"
            fresh_uids(datasets)

        write_scan(tmp_path / "s" / str(number), scan, set_echo, modality="MR", number=5)
    assert "series 5.1: MR" in str(refusal(tmp_path / "s"))
    for number, scan in enumerate(positive, start=1):
        assert_same(read(tmp_path / "s", series=f"5.{number}"), scan)


@pytest.mark.parametrize("orientation", ["oblique", "tilted"])
@pytest.mark.parametrize("is_enhanced", [True, False])
def test_multi_frame_images_are_read(tmp_path: Path, orientation: str, is_enhanced: bool) -> None:
    """Written by highdicom, and for right-angled grids read by it, too."""
    scan = make_scan(make_grid(orientation))
    classic = build_series(scan, SeriesOptions("e"))
    image = hd.legacy.LegacyConvertedEnhancedCTImage(
        classic[::-1], hd.UID(), 7, hd.UID(), 1, transfer_syntax_uid=hd.UID("1.2.840.10008.1.2.1")
    )
    if is_enhanced:
        image.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
        image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.save_as(tmp_path / "enhanced.dcm")
    file = read(tmp_path / "enhanced.dcm")
    assert_same(file, scan)
    if orientation == "oblique":
        volume = hd.imread(tmp_path / "enhanced.dcm").get_volume()
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine[:, [2, 1, 0, 3]]
        reference = Volume(volume.array.astype(np.int16), Grid(volume.array.shape, affine))
        assert_same(file, reference)


def test_a_compressed_multi_frame_image_is_read(tmp_path: Path) -> None:
    scan = make_scan()
    image = hd.legacy.LegacyConvertedEnhancedCTImage(
        build_series(scan, SeriesOptions("e")), hd.UID(), 7, hd.UID(), 1
    )
    image.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    image.save_as(tmp_path / "enhanced.dcm")
    assert_same(read(tmp_path / "enhanced.dcm"), scan)


def test_zip_files_and_lists_of_files_are_read(tmp_path: Path) -> None:
    scan = make_scan()
    folder = write_scan(tmp_path / "s", scan)
    files = sorted(folder.iterdir())
    with zipfile.ZipFile(tmp_path / "s.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, f"../../evil/{file.name}")
    before = set(tmp_path.rglob("*"))
    assert_same(read(tmp_path / "s.zip"), scan)
    assert set(tmp_path.rglob("*")) == before
    assert_same(read(*files[::-1]), scan)


def test_a_zip_that_expands_too_far_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "s.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", bytes(1 << 20))
    monkeypatch.setattr("liverseg_dist.data.io.dicom_files.MAX_ZIP_BYTES", 1 << 19)
    assert refusal(tmp_path / "s.zip").code == "dicom_zip_size"
    (tmp_path / "s.zip").write_bytes(b"PK\3\4" + bytes(100))
    assert refusal(tmp_path / "s.zip").code == "dicom_zip"


def test_truncated_and_damaged_files_are_named(tmp_path: Path) -> None:
    folder = write_scan(tmp_path / "s", make_scan())
    file = folder / "IM0007.dcm"
    content = file.read_bytes()
    file.write_bytes(content[:-50])
    error = refusal(folder)
    assert error.code == "dicom_pixels"
    assert "file 7" in str(error)
    assert "IM0007" not in str(error)
    file.write_bytes(content[:140] + b"\xff" * 60)
    assert refusal(folder).code == "dicom_gap"


def test_claims_of_huge_frames_are_refused(tmp_path: Path) -> None:
    def grow(datasets: list[Any]) -> None:
        for dataset in datasets:
            dataset.Rows = dataset.Columns = 65535

    assert refusal(write_scan(tmp_path / "s", make_scan(), grow)).code == "dicom_pixels"


def test_the_list_of_series_has_no_text_of_the_file(tmp_path: Path) -> None:
    two_series(tmp_path / "s")
    stacks, _ = list_source_stacks(DicomScan((tmp_path / "s",), "scan_x"))
    assert [stack.label for stack in stacks] == ["3", "4"]
    assert "arterial" not in stacks[0].describe()
    assert '"arterial"' in stacks[0].describe(with_text=True)


def test_links_that_lead_in_a_circle_end(tmp_path: Path) -> None:
    scan = make_scan()
    folder = write_scan(tmp_path / "s", scan)
    for name in ("a", "b", "c"):
        (folder / name).symlink_to(folder)
    assert_same(read(folder), scan)
