"""The commands on DICOM inputs: predict, quantify, follow, to-nifti, and what they disclose."""

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from liverseg_dist.commands.main import main
from liverseg_dist.data.io.nifti import read_nifti
from liverseg_dist.optional_packages import quiet_pydicom
from liverseg_dist.phantom.dicom_series import SeriesOptions, build_series, write_series
from tests.inference.small_run import SmallRun

ONE_THREAD = ("--device", "cpu", "--threads", "1")
SECRETS = ("DOE^Jane", "DOE_Jane", "DOE Jane", "19561231", "ACC4711", "MRN0815")
"""Texts that identify the made-up patient; long enough not to occur in pictures by chance."""


@pytest.fixture(autouse=True)
def name_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVERSEG_NAME_KEY", "test")


def plant_secrets(datasets: list[Any]) -> None:
    """The name of the patient in every text tag that a scanner or a clerk may fill in."""
    with quiet_pydicom():
        for dataset in datasets:
            plant_in(dataset)


def plant_in(dataset: Any) -> None:
    dataset.PatientName = "DOE^Jane"
    dataset.PatientID = "MRN0815"
    dataset.PatientBirthDate = "19561231"
    dataset.AccessionNumber = "ACC4711"
    for keyword in (
        "StudyDescription", "SeriesDescription", "ProtocolName", "InstitutionName",
        "ReferringPhysicianName", "OperatorsName", "ImageComments", "PatientComments",
        "StationName", "RequestedProcedureDescription", "ContrastBolusAgent", "StudyID",
        "BodyPartExamined", "Manufacturer", "DeviceSerialNumber", "AcquisitionDate",
    ):  # fmt: skip
        value = "19561231" if keyword.endswith("Date") else "DOE Jane MRN0815"[:16]
        setattr(dataset, keyword, value)
    block = dataset.private_block(0x0009, "DOE Jane", create=True)
    block.add_new(0x01, "LO", "DOE Jane MRN0815")


def write_case(folder: Path, nifti: Path, secret: bool = True) -> Path:
    """A phantom scan as DICOM in a folder that has the name of the patient."""
    datasets = build_series(read_nifti(nifti), SeriesOptions(key=nifti.name))
    if secret:
        plant_secrets(datasets)
    write_series(folder, datasets)
    return folder


def search_secrets(folder: Path, uids: set[str]) -> list[str]:
    """Files below a folder whose name or content has a secret; .dcm files by their names alone."""
    found = []
    for file in sorted(folder.rglob("*")):
        texts = [str(file.relative_to(folder)).encode()]
        if file.is_file() and file.suffix != ".dcm":
            content = file.read_bytes()
            texts.append(gzip.decompress(content) if file.suffix == ".gz" else content)
        for text in texts:
            for secret in (*SECRETS, *uids):
                if secret.encode() in text:
                    found.append(f"{file.name}: {secret}")
    return found


def list_uids(folder: Path) -> set[str]:
    uids = set()
    for file in folder.rglob("*.dcm"):
        dataset = pydicom.dcmread(file, stop_before_pixels=True)
        uids |= {dataset.SOPInstanceUID, dataset.SeriesInstanceUID, dataset.StudyInstanceUID}
    return {str(uid) for uid in uids}


def test_predict_on_dicom_equals_predict_on_nifti_and_discloses_nothing(
    small_run: SmallRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    nifti = small_run.source / "imagesTr" / "liver_1.nii.gz"
    case = write_case(tmp_path / "in" / "DOE_Jane_19561231" / "MRN0815", nifti)
    out = tmp_path / "out"
    arguments = ["predict", str(small_run.run), str(case.parent), "--out", str(out), *ONE_THREAD]
    assert main([*arguments, "--verbose"]) == 0
    mask_file = next(out.glob("scan_*.nii.gz"))
    name = mask_file.name.removesuffix(".nii.gz")
    assert {file.name for file in out.glob("*.dcm")} == {f"{name}.seg.dcm", f"{name}.sr.dcm"}
    seg = pydicom.dcmread(out / f"{name}.seg.dcm")
    assert str(seg.PatientName) == "DOE^Jane"
    # The same voxels, from the same scan in NIfTI.
    assert main(["predict", str(small_run.run), str(nifti), "--out", str(tmp_path / "n"),
                 *ONE_THREAD]) == 0  # fmt: skip
    own, reference = (
        read_nifti(mask_file, "label"),
        read_nifti(tmp_path / "n" / nifti.name, "label"),
    )
    expected = reference.reoriented(own.grid.orientation)
    assert own.grid.matches(expected.grid, 0.01)
    assert np.mean(own.voxels != expected.voxels) < 1e-4
    # Finished scans are not segmented again, unless a DICOM result is missing.
    capfd.readouterr()
    assert main(arguments) == 0
    assert "(done before)" in capfd.readouterr().out
    (out / f"{name}.seg.dcm").unlink()
    assert main(arguments) == 0
    assert "(done before)" not in capfd.readouterr().out
    assert (out / f"{name}.seg.dcm").is_file()
    assert main(["quantify", str(mask_file), "--images", str(case), "--out", str(out / "q")]) == 0
    quantities = json.loads((out / "q" / "quantities.json").read_text())
    assert quantities["cases"][0]["structures"][0]["intensity"] is not None
    assert main(["follow", str(mask_file), str(tmp_path / "n" / nifti.name), "--images", str(case),
                 str(nifti), "--registration", "rigid", "--out", str(out / "f")]) == 0  # fmt: skip
    assert search_secrets(out, list_uids(case)) == []


def test_nothing_is_disclosed_on_the_terminal(
    small_run: SmallRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    nifti = small_run.source / "imagesTr" / "liver_1.nii.gz"
    folder = tmp_path / "in"
    good = write_case(folder / "DOE_Jane" / "a", nifti)
    bad = write_case(folder / "DOE_Jane_2" / "a", small_run.source / "imagesTr" / "liver_2.nii.gz")
    (bad / "IM0005.dcm").unlink()
    (good / "IM0003.dcm").write_bytes((good / "IM0003.dcm").read_bytes()[:-99])
    uids = list_uids(folder)
    capfd.readouterr()
    for arguments in (
        ["predict", str(small_run.run), str(folder), "--out", str(tmp_path / "out"), *ONE_THREAD],
        ["to-nifti", str(good), "--out", str(tmp_path / "x.nii.gz")],
        ["to-nifti", str(bad), "--out", str(tmp_path / "x.nii.gz")],
        ["to-nifti", str(folder), "--list", "--json"],
        ["to-nifti", str(bad), "--series", "77", "--out", str(tmp_path / "x.nii.gz")],
    ):
        main([*arguments, "--verbose"])
    captured = capfd.readouterr()
    text = captured.out + captured.err
    assert "1 slice(s) of" in text
    assert "truncated" in text
    assert "Traceback" not in text
    for secret in (*SECRETS, *uids):
        assert secret not in text, secret
    assert search_secrets(tmp_path / "out", uids) == []


def test_to_nifti_writes_what_the_reader_sees(
    small_run: SmallRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    nifti = small_run.source / "imagesTr" / "liver_2.nii.gz"
    case = write_case(tmp_path / "case", nifti, secret=False)
    with zipfile.ZipFile(tmp_path / "case.zip", "w") as archive:
        for file in case.iterdir():
            archive.write(file, file.name)
    for source in (case, tmp_path / "case.zip"):
        out = tmp_path / "x.nii.gz"
        assert main(["to-nifti", str(source), "--out", str(out)]) == 0
        volume, original = read_nifti(out), read_nifti(nifti)
        expected = original.reoriented(volume.grid.orientation)
        assert volume.grid.matches(expected.grid, 0.01)
        np.testing.assert_array_equal(volume.voxels, expected.voxels)
    capfd.readouterr()
    assert main(["to-nifti", str(case), "--list", "--text"]) == 0
    assert "series 3: CT, " in capfd.readouterr().out
    assert main(["to-nifti", str(case)]) == 2
    assert main(["to-nifti", str(nifti), "--out", str(tmp_path / "y.nii.gz")]) == 2


def test_an_mr_series_is_refused_by_a_run_for_ct(
    small_run: SmallRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    volume = read_nifti(small_run.source / "imagesTr" / "liver_1.nii.gz")
    datasets = build_series(
        volume.with_voxels(np.clip(volume.voxels + 1024, 0, None)),
        SeriesOptions(key="mr", modality="MR"),
    )
    write_series(tmp_path / "mr", datasets)
    out = tmp_path / "out"
    arguments = ["predict", str(small_run.run), str(tmp_path / "mr"), "--out", str(out)]
    assert main([*arguments, *ONE_THREAD]) == 1
    assert "the file is MR, but the run was trained on CT" in capfd.readouterr().err


def test_without_the_extra_one_line_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.dcm").write_bytes(bytes(128) + b"DICM" + bytes(100))
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "gdcm" else find(name)
    )
    assert main(["to-nifti", str(tmp_path), "--list"]) == 2
    error = capfd.readouterr().err
    assert "pip install 'liverseg_dist[dicom]'" in error
    assert error.count("\n") == 1
