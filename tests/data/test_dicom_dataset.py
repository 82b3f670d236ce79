"""Data sets of DICOM series: the store is that of the same scans in NIfTI."""

import json
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import skimage.draw

from liverseg_dist.commands.main import main
from liverseg_dist.data.findings import ScanFileError
from liverseg_dist.data.io.dicom_segments import list_segment_names, read_segments
from liverseg_dist.data.io.dicom_series import DicomScan, read_dicom_scan
from liverseg_dist.data.io.dicom_structure_set import STRUCTURE_SET_CLASS
from liverseg_dist.data.io.nifti import read_nifti
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.inference.dicom_results import DicomResults, write_dicom_results
from liverseg_dist.labels import LITS_SCHEME
from liverseg_dist.volume import Grid, Volume
from tests.conftest import SMALL_STORE
from tests.data.dicom_sources import make_grid, make_scan, write_scan


@pytest.fixture(autouse=True)
def name_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVERSEG_NAME_KEY", "test")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same two phantoms as NIfTI and as DICOM."""
    folder = tmp_path_factory.mktemp("sources")
    nifti, dicom = folder / "nifti", folder / "dicom"
    assert main(["phantom", str(nifti), "--cases", "2", "--seed", "3"]) == 0
    arguments = ["phantom", str(dicom), "--cases", "2", "--seed", "3", "--format", "dicom"]
    assert main(arguments) == 0
    assert main(arguments) == 0
    return nifti, dicom


def convert(source: Path, store: Path, *options: str) -> CaseStore:
    assert main(["convert", str(source), str(store), *SMALL_STORE, *options]) == 0
    return CaseStore.open(store)


def assert_equal_stores(one: CaseStore, other: CaseStore) -> None:
    assert one.case_ids == other.case_ids
    for case_id in one.case_ids:
        np.testing.assert_array_equal(one.image(case_id), other.image(case_id))
        np.testing.assert_array_equal(one.label(case_id), other.label(case_id))


def test_the_store_equals_that_of_nifti_files(sources: tuple[Path, Path], tmp_path: Path) -> None:
    nifti, dicom = sources
    expected = convert(nifti, tmp_path / "n.zarr")
    found = convert(dicom, tmp_path / "d.zarr", "--names", "folder")
    assert_equal_stores(found, expected)
    names = set(convert(dicom, tmp_path / "p.zarr").case_ids)
    assert len(names) == 2
    assert all(name.startswith("scan_") for name in names)


def test_labels_may_be_segmentations(sources: tuple[Path, Path], tmp_path: Path) -> None:
    """A SEG that was written from the NIfTI label gives the same store."""
    _, dicom = sources
    expected = convert(dicom, tmp_path / "n.zarr", "--names", "folder")
    copy = tmp_path / "seg"
    shutil.copytree(dicom, copy)
    (copy / "dataset.json").unlink()
    for case in sorted(copy.glob("liver_*")):
        scan = DicomScan((case / "ct",), "label")
        grid = read_dicom_scan(scan).volume.grid
        label = read_nifti(case / "label.nii.gz", "label").reoriented(grid.orientation)
        (case / "label.nii.gz").unlink()
        mask = Volume(np.ascontiguousarray(label.voxels), grid)
        (written,) = write_dicom_results(
            scan, mask, LITS_SCHEME, case, DicomResults(with_report=False)
        )
        assert {one.structure for one in list_segment_names(written)} <= {"liver", "tumour"}
    found = convert(copy, tmp_path / "s.zarr", "--names", "folder")
    assert_equal_stores(found, expected)


@pytest.mark.parametrize("kind", ["binary", "labelmap"])
@pytest.mark.parametrize("orientation", ["oblique", "tilted"])
def test_segments_are_read_on_the_grid_of_the_scan(
    tmp_path: Path, kind: str, orientation: str
) -> None:
    scan = DicomScan((write_scan(tmp_path / "s", make_scan(make_grid(orientation))),), "scan")
    grid = read_dicom_scan(scan).volume.grid
    values = np.zeros(grid.shape, np.uint8)
    values[3:20, 4:30, 5:38] = 1
    values[5:9, 8:13, 8:14] = 2
    values[12:15, 20:25, 20:26] = 2
    options = DicomResults(kind, with_report=False)  # type: ignore[arg-type]
    (file,) = write_dicom_results(scan, Volume(values, grid), LITS_SCHEME, tmp_path, options)
    tumour = read_segments(file, "tumour", grid)
    np.testing.assert_array_equal(tumour.voxels, values == 2)
    liver = read_segments(file, "liver", grid).voxels
    np.testing.assert_array_equal(liver, values == 1 if kind == "labelmap" else values > 0)
    other = write_scan(tmp_path / "o", make_scan(make_grid("sagittal")))
    with pytest.raises(ScanFileError, match="another series"):
        read_segments(file, "liver", read_dicom_scan(DicomScan((other,), "o")).volume.grid)


def test_the_store_names_no_patient(sources: tuple[Path, Path], tmp_path: Path) -> None:
    _, dicom = sources
    source = tmp_path / "set"
    shutil.copytree(dicom, source)
    for number, case in enumerate(sorted(source.glob("liver_*"))):
        (case / "label.nii.gz").rename(case / f"DOE_Jane_{number}.nii.gz")
        case.rename(source / f"DOE_Jane_{number}")
    damaged = sorted((source / "DOE_Jane_1").glob("*.nii.gz"))[0]
    damaged.write_bytes(damaged.read_bytes()[:500])
    store = tmp_path / "store.zarr"
    main(["convert", str(source), str(store), *SMALL_STORE, "--json"])
    assert json.loads((store / "zarr.json").read_text())
    for file in store.rglob("*"):
        assert "DOE" not in file.name
        if file.is_file():
            assert b"DOE_Jane" not in file.read_bytes(), file.name


def patients_of(store: CaseStore) -> int:
    return len({store.meta(case_id).patient for case_id in store.case_ids})


def test_scans_of_one_patient_stay_together(sources: tuple[Path, Path], tmp_path: Path) -> None:
    """By PatientID, of which the store has a keyed hash only; one id for all is no patient."""
    _, dicom = sources
    source = tmp_path / "set"
    shutil.copytree(dicom, source)
    # A second scan of the first patient: other voxels, so that it is no duplicate.
    second = source / "second"
    shutil.copytree(source / "liver_0", second)
    for number, file in enumerate(sorted((second / "ct").iterdir())):
        dataset = pydicom.dcmread(file)
        dataset.StudyInstanceUID = f"{dataset.StudyInstanceUID[:-2]}9"
        dataset.SeriesInstanceUID = f"{dataset.SeriesInstanceUID[:-2]}9"
        dataset.SOPInstanceUID = f"{dataset.SOPInstanceUID[:-4]}{number:04d}"
        # One HU more.
        dataset.RescaleIntercept = str(int(dataset.RescaleIntercept) + 1)
        dataset.save_as(file)
    store = convert(source, tmp_path / "a.zarr")
    assert len(store.case_ids) == 3
    assert patients_of(store) == 2
    for file in (source / "liver_1" / "ct").iterdir():
        dataset = pydicom.dcmread(file)
        dataset.PatientID = pydicom.dcmread(second / "ct" / "IM0001.dcm").PatientID
        dataset.save_as(file)
    assert patients_of(convert(source, tmp_path / "b.zarr")) == 3


def write_structure_set(file: Path, grid: Grid, slices: range) -> np.ndarray:
    """A tube and a ball-like part as contours at voxel centres of slices; returns the truth of the
    tube by skimage."""
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    truth = np.zeros(grid.shape, bool)
    contours = []
    for at in slices:
        for radius in (11.3, 4.2):
            rows, columns = 17.2 + radius * np.sin(angle), 21.4 + radius * np.cos(angle)
            world = grid.world_mm(np.column_stack([np.full(40, at), rows, columns]))
            contour = pydicom.Dataset()
            contour.ContourGeometricType = "CLOSED_PLANAR"
            contour.NumberOfContourPoints = 40
            points = (world * [-1, -1, 1]).reshape(-1)
            contour.ContourData = [f"{one:.4f}" for one in points]
            contours.append(contour)
            corners = np.column_stack([rows, columns])
            truth[at] ^= skimage.draw.polygon2mask(grid.shape[1:], corners)
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = STRUCTURE_SET_CLASS
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    roi, item = pydicom.Dataset(), pydicom.Dataset()
    roi.ROINumber, roi.ROIName = 4, "liver"
    item.ReferencedROINumber, item.ContourSequence = 4, contours
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [roi], [item]
    dataset.save_as(file, enforce_file_format=True)
    return truth


@pytest.mark.parametrize("orientation", ["axial", "oblique", "tilted"])
def test_contours_are_read_with_their_holes(tmp_path: Path, orientation: str) -> None:
    scan = DicomScan((write_scan(tmp_path / "s", make_scan(make_grid(orientation))),), "scan")
    grid = read_dicom_scan(scan).volume.grid
    truth = write_structure_set(tmp_path / "rs.dcm", grid, range(5, 12))
    assert [one.structure for one in list_segment_names(tmp_path / "rs.dcm")] == ["liver"]
    mask = read_segments(tmp_path / "rs.dcm", "liver", grid)
    np.testing.assert_array_equal(mask.voxels, truth)
    with pytest.raises(ScanFileError, match="another series"):
        read_segments(tmp_path / "rs.dcm", "liver", grid.cropped((0, 0, 0), (8, *grid.shape[1:])))
