"""`liverseg quantify`: files, resumption, ranks, any scheme, a run, and mistakes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from liverseg_dist.commands.main import main
from liverseg_dist.data.io.nifti import read_nifti, write_image, write_mask
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER
from tests.clinical.test_quantify import GRID, make_case
from tests.distributed.launch import torchrun
from tests.inference.small_run import SmallRun

RESULTS = ("lesions.csv", "structures.csv", "quantities.json", "quantities.html")


def write_case(folder: Path, name: str, label: np.ndarray | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.nii.gz"
    write_mask(file, make_case().voxels if label is None else label, GRID)
    return file


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict, str]:
    code = main(["quantify", *map(str, arguments), "--json", "--device", "cpu"])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, json.loads(captured.out.splitlines()[-1]), captured.err


def test_masks_with_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("case_2", "case_10"):
        write_case(tmp_path / "masks", name)
    (tmp_path / "scans").mkdir()
    values = np.where(make_case().voxels == 2, 60, 110).astype(np.int16)
    write_image(tmp_path / "scans" / "case_2_0000.nii.gz", values, GRID)
    out = tmp_path / "out"
    code, result, _ = call(capsys, tmp_path / "masks", "--images", tmp_path / "scans", "--out", out)
    assert (code, result["n_cases"], result["n_lesions"], result["reused"]) == (EXIT_DONE, 2, 4, 0)
    lesions = rows_of(out / "lesions.csv")
    assert list(lesions[0])[:7] == [
        "case", "structure", "lesion", "volume_ml", "long_axis_mm", "short_axis_mm", "longest_3d_mm",
    ]  # fmt: skip
    assert [row["case"] for row in lesions] == ["case_2", "case_2", "case_10", "case_10"]
    assert float(lesions[0]["intensity_mean"]) == 60.0
    assert lesions[2]["intensity_mean"] == ""
    structures = rows_of(out / "structures.csv")
    assert list(structures[0])[:2] == ["case", "structure"]
    assert {"volume_ml", "burden"} <= structures[0].keys()
    content = json.loads((out / "quantities.json").read_text())
    assert content["schema"] == 1
    assert str(tmp_path) not in json.dumps(content)
    page = (out / "quantities.html").read_text()
    assert "default-src 'none'" in page
    assert page.count("<image ") == 2  # of the case with a scan
    assert page.count('class="long"') == 4
    assert str(tmp_path) not in page
    before = {name: (out / name).read_bytes() for name in RESULTS}
    code, result, _ = call(capsys, tmp_path / "masks", "--images", tmp_path / "scans", "--out", out)
    assert (code, result["reused"]) == (EXIT_DONE, 2)
    assert {name: (out / name).read_bytes() for name in RESULTS} == before


def test_every_channel_has_its_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file for each channel (nnU-Net), and all channels in one file in 4D."""
    label = make_case().voxels
    write_case(tmp_path / "masks", "files")
    write_case(tmp_path / "masks", "four")
    (tmp_path / "scans").mkdir()
    channels = [np.where(label == 2, value, 110).astype(np.int16) for value in (60, 300)]
    for number, values in enumerate(channels):
        write_image(tmp_path / "scans" / f"files_000{number}.nii.gz", values, GRID)
    image = SimpleITK.JoinSeries(
        [SimpleITK.ReadImage(str(tmp_path / "scans" / f"files_000{n}.nii.gz")) for n in (0, 1)]
    )
    SimpleITK.WriteImage(image, str(tmp_path / "scans" / "four.nii.gz"))
    out = tmp_path / "out"
    code, _, _ = call(capsys, tmp_path / "masks", "--images", tmp_path / "scans", "--out", out)
    assert code == EXIT_DONE
    lesions = rows_of(out / "lesions.csv")
    assert {row["case"] for row in lesions} == {"files", "four"}
    for row in lesions:
        assert (float(row["intensity_mean"]), float(row["channel_2_mean"])) == (60.0, 300.0)
    assert "60.0 / 300.0" in (out / "quantities.html").read_text()
    # A second channel on another grid is named and left out.
    write_image(
        tmp_path / "scans" / "files_0001.nii.gz",
        channels[1][1:],
        GRID.cropped((1, 0, 0), channels[1][1:].shape),
    )
    code, _, err = call(capsys, tmp_path / "masks", "--images", tmp_path / "scans", "--out", out)
    assert code == EXIT_DONE
    assert "files_0001.nii.gz does not lie on the mask's grid" in err


def test_a_changed_mask_is_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_case(tmp_path / "masks", "one")
    write_case(tmp_path / "masks", "two")
    call(capsys, tmp_path / "masks", "--out", tmp_path / "out")
    write_case(tmp_path / "masks", "two", np.minimum(make_case().voxels, 1))
    _, result, _ = call(capsys, tmp_path / "masks", "--out", tmp_path / "out")
    assert (result["reused"], result["n_lesions"]) == (1, 2)
    _, result, _ = call(
        capsys, tmp_path / "masks", "--out", tmp_path / "out", "--connectivity", "26"
    )
    assert result["reused"] == 0


def test_ranks_write_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        write_case(
            tmp_path / "masks", f"case_{number}", np.roll(make_case().voxels, number, axis=1)
        )
    call(capsys, tmp_path / "masks", "--out", tmp_path / "one" / "out")
    arguments = ("quantify", str(tmp_path / "masks"), "--out", str(tmp_path / "two" / "out"))
    ended = torchrun(2, "-m", "liverseg_dist", *arguments, "--device", "cpu")
    assert ended.returncode == 0, ended.stderr
    for name in RESULTS:
        assert (tmp_path / "two" / "out" / name).read_bytes() == (
            tmp_path / "one" / "out" / name
        ).read_bytes()


def test_any_scheme_from_a_dataset_or_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = np.array([0, 6, 7], np.uint8)[make_case().voxels]
    file = write_case(tmp_path / "set" / "labelsTr", "amos", label)
    code, result, _ = call(capsys, file, "--out", tmp_path / "wrong")
    assert code == EXIT_USER
    assert "label value 6, 7" in result["error"]
    labels = {"labels": {"background": 0, "liver": [6, 7], "metastasis": 7}}
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(labels))
    code, result, _ = call(capsys, tmp_path / "set", "--out", tmp_path / "beside")
    assert (code, result["n_lesions"]) == (EXIT_DONE, 2)
    code, result, err = call(capsys, file, "--labels", "liver=6", "--out", tmp_path / "line")
    assert (code, result["n_lesions"]) == (EXIT_DONE, 0)
    assert "7" in err
    assert rows_of(tmp_path / "line" / "structures.csv")[0]["structure"] == "liver"


def test_masks_of_different_schemes_are_not_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_case(tmp_path / "a" / "labelsTr", "one")
    write_case(tmp_path / "b" / "labelsTr", "two")
    (tmp_path / "a" / "dataset.json").write_text(
        '{"labels": {"0": "background", "1": "spleen", "2": "cyst"}}'
    )
    code, result, _ = call(capsys, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    assert code == EXIT_USER
    assert "labels differ" in result["error"]
    assert not (tmp_path / "out").exists()


def test_scans_with_a_run(
    small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = small_run.source / "imagesTr" / "liver_0.nii.gz"
    out = tmp_path / "out"
    code, result, _ = call(capsys, scan, "--run", small_run.run, "--probabilities", "--out", out)
    assert (code, result["n_cases"]) == (EXIT_DONE, 1)
    mask = read_nifti(out / "masks" / "liver_0.nii.gz", "label")
    structures = {row["structure"]: row for row in rows_of(out / "structures.csv")}
    expected = (mask.voxels > 0).sum() * mask.grid.voxel_volume_ml
    assert float(structures["liver"]["volume_ml"]) == pytest.approx(expected, rel=1e-4)
    low, high = (float(structures["liver"][f"volume_{end}_ml"]) for end in ("low", "high"))
    assert low < float(structures["liver"]["volume_expected_ml"]) < high
    assert structures["liver"]["intensity_mean"] != ""
    # A folder of predictions is measured as it lies.
    code, result, _ = call(capsys, out / "masks", "--out", tmp_path / "again")
    assert (code, result["n_cases"]) == (EXIT_DONE, 1)


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_case(tmp_path / "masks", "good")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    write_image(tmp_path / "other" / "elsewhere.nii.gz", np.zeros(GRID.shape, np.int16), GRID)
    for arguments, reason in (
        ((tmp_path / "absent",), "no such file"),
        ((tmp_path / "empty",), "no .nii"),
        ((good, "inference.overlap=0.5"), "--run"),
        ((good, "--images", tmp_path / "other"), "name of a mask"),
        ((good, "--labels", "nothing.json"), "nothing.json"),
        ((good, "--labels", "liver=1", "--labels", "tumour=1"), None),
    ):
        code, result, err = call(capsys, *arguments, "--out", tmp_path / "out")
        if reason is not None:
            assert code == EXIT_USER
            assert reason in result["error"]
            assert len(err.strip().splitlines()) == 1
    # A damaged file is named, and the others are measured.
    (tmp_path / "masks" / "bad.nii.gz").write_bytes(good.read_bytes()[:500])
    code, result, _ = call(capsys, tmp_path / "masks", "--out", tmp_path / "out")
    assert (code, list(result["failed"])) == (EXIT_FAILED, ["bad"])
    rows = {row["case"]: row for row in rows_of(tmp_path / "out" / "structures.csv")}
    assert rows["bad"]["status"] == "failed"
    assert str(tmp_path) not in rows["bad"]["error"]
    assert rows["good"]["status"] == "done"


def test_an_empty_mask_is_zero_and_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_case(tmp_path / "masks", "nothing", np.zeros(GRID.shape, np.uint8))
    code, result, err = call(capsys, tmp_path / "masks", "--out", tmp_path / "out")
    assert (code, result["n_lesions"]) == (EXIT_DONE, 0)
    assert "empty" in err
    assert [row["volume_ml"] for row in rows_of(tmp_path / "out" / "structures.csv")] == ["0", "0"]


def test_a_hostile_name_stays_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_case(tmp_path / "masks", "=1+1<script>")
    call(capsys, tmp_path / "masks", "--out", tmp_path / "out")
    assert "<script>" not in (tmp_path / "out" / "quantities.html").read_text()
    assert rows_of(tmp_path / "out" / "lesions.csv")[0]["case"].startswith("'=")
