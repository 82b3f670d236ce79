"""Data sets of DICOM series: the store is that of the same scans in NIfTI."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from liverseg_dist.commands.main import main
from liverseg_dist.data.findings import ScanFileError
from liverseg_dist.data.io.dicom_segments import list_segment_names, read_segments
from liverseg_dist.data.io.dicom_series import DicomScan, read_dicom_scan
from liverseg_dist.data.io.nifti import read_nifti
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.inference.dicom_results import DicomResults, write_dicom_results
from liverseg_dist.labels import LITS_SCHEME
from liverseg_dist.volume import Volume
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
        assert [one.structure for one in list_segment_names(written)][:2] == ["liver", "tumour"]
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
            assert b"DOE" not in file.read_bytes(), file.name
