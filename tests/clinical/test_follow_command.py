"""`liverseg follow`: results over three dates, response, mistakes, and a page without anything from
outside."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from liverseg_dist.commands.main import main
from liverseg_dist.data.io.nifti import write_image, write_mask
from liverseg_dist.errors import EXIT_DONE, EXIT_USER
from liverseg_dist.volume import Volume
from tests.clinical.patients import BASELINE, FOLLOW_UP, STILL, Motion, paint_patient
from tests.inference.small_run import SmallRun

GROWS, GOES = (20.0, 5.0, 10.0), (-20.0, -12.0, -5.0)
MERGES_A, MERGES_B, SPLITS, COMES = (
    (-6.0, 22.0, 0.0),
    (9.0, 22.0, 0.0),
    (-30.0, 12.0, 8.0),
    (32.0, -12.0, -6.0),
)
PIECES = [(-37.0, 12.0, 8.0, 4.5), (-23.0, 12.0, 8.0, 4.5)]
DATES = (
    [(*GROWS, 7.0), (*GOES, 6.0), (*MERGES_A, 6.0), (*MERGES_B, 5.0), (*SPLITS, 9.0)],
    [(*GROWS, 9.0), (*MERGES_A, 8.5), (*MERGES_B, 8.0), *PIECES],
    [(*GROWS, 11.0), (*MERGES_A, 9.0), (*MERGES_B, 9.0), *PIECES, (*COMES, 6.0)],
)  # fmt: skip
MOTIONS = (STILL, Motion(), Motion(-4.0, (-5.0, 4.0, -6.0), 3.0))


def write_scan(folder: Path, name: str, scan: tuple[Volume, Volume]) -> Path:
    for part in ("masks", "scans"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    mask, image = scan
    write_mask(folder / "masks" / f"{name}.nii.gz", mask.voxels, mask.grid)
    write_image(folder / "scans" / f"{name}.nii.gz", image.voxels, image.grid)
    return folder / "masks" / f"{name}.nii.gz"


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict, str]:
    code = main(["follow", *map(str, arguments), "--json", "--device", "cpu"])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, json.loads(captured.out.splitlines()[-1]), captured.err


def test_three_dates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = []
    for number, (balls, motion) in enumerate(zip(DATES, MOTIONS, strict=True)):
        scan = paint_patient(FOLLOW_UP if number else BASELINE, motion, balls)
        masks.append(write_scan(tmp_path, f"date_{number}", scan))
    dates = "2024-01-10,2024-04-10,2024-07-10"
    out = tmp_path / "out"
    code, result, _ = call(
        capsys, *masks, "--images", tmp_path / "scans", "--dates", dates, "--out", out
    )
    assert code == EXIT_DONE
    content = json.loads((out / "follow.json").read_text())
    assert content["dates"] == dates.split(",")
    assert content["days"] == [0, 91, 182]
    by_place = {}
    for lesion in content["lesions"]:
        by_place[tuple(lesion["centroid_mm"])] = lesion

    def at(place: tuple[float, float, float]) -> dict:
        nearest = min(by_place, key=lambda position: np.linalg.norm(np.subtract(position, place)))
        assert np.linalg.norm(np.subtract(nearest, place)) <= 4.0
        return by_place[nearest]

    assert at(GROWS)["status"] == "persistent"
    assert at(GOES)["status"] == "vanished"
    assert at(GOES)["volume_ml"][1:] == [0.0, 0.0]
    assert at(MERGES_A)["status"] == at(MERGES_B)["status"] == "merged"
    assert at(SPLITS)["status"] == "split"
    assert at(COMES)["status"] == "new"
    assert at(COMES)["volume_ml"][:2] == [None, None]
    assert len(content["lesions"]) == 7
    growth = at(GROWS)["growth"]
    truth = 182 * np.log(2) / (3 * np.log(11 / 7))
    low, high = growth["doubling_interval"]
    assert low <= truth <= high
    assert growth["doubling_days"] == pytest.approx(truth, rel=0.15)
    assert at(GROWS)["long_axis_mm"][2] == pytest.approx(22.0, abs=1.5)
    assert content["response"]["recist"] == result["recist"] == "PD"
    assert at(COMES)["id"] in content["response"]["dates"][-1]["new_lesions"]
    assert "new lesion" in content["response"]["rule"]
    for quality in content["registration"]:
        assert quality["dice"] >= 0.93
        assert quality["folding"] == 0.0
    with (out / "follow.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 7 * 3
    page = (out / "follow.html").read_text()
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<image ") == 7 * 3
    for text in (page, json.dumps(content)):
        assert str(tmp_path) not in text


def test_without_dates_there_is_no_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_scan(tmp_path, "one", paint_patient(BASELINE, STILL, [(*GROWS, 9.0)]))
    second = write_scan(tmp_path, "two", paint_patient(BASELINE, STILL, [(*GROWS, 5.2)]))
    code, result, _ = call(
        capsys, first, second, "--registration", "rigid", "--out", tmp_path / "out"
    )
    assert (code, result["recist"], result["volumetric"]) == (EXIT_DONE, "PR", "PR")
    content = json.loads((tmp_path / "out" / "follow.json").read_text())
    assert content["dates"] is None
    assert content["lesions"][0]["growth"] is None
    # The same scan twice: nothing changed beyond the error, and the result says so.
    again = write_scan(tmp_path, "three", paint_patient(BASELINE, STILL, [(*GROWS, 9.0)]))
    _, result, _ = call(capsys, first, again, "--registration", "rigid", "--out", tmp_path / "same")
    assert result["recist"] == "SD"
    content = json.loads((tmp_path / "same" / "follow.json").read_text())
    assert "measurement error" in content["response"]["warning"]


def test_another_patient_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_scan(tmp_path, "one", paint_patient(BASELINE, STILL, [(*GROWS, 9.0)]))
    other = write_scan(
        tmp_path, "two", paint_patient(BASELINE, STILL, [(*GROWS, 9.0)], (34.0, 58.0, 55.0))
    )
    out = tmp_path / "out"
    code, result, err = call(capsys, first, other, "--registration", "rigid", "--out", out)
    assert code == EXIT_USER
    assert "one patient" in result["error"]
    assert not out.exists()
    assert err.strip().splitlines()[-1].startswith("liverseg: two and one")
    code, _, _ = call(
        capsys, first, other, "--registration", "rigid", "--allow-mismatch", "--out", out
    )
    assert code == EXIT_DONE


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = paint_patient(BASELINE, STILL, [(*GROWS, 9.0)])
    first, second = write_scan(tmp_path, "one", scan), write_scan(tmp_path, "two", scan)
    mask, image = scan
    empty = write_scan(tmp_path, "empty", (mask.with_voxels(np.zeros_like(mask.voxels)), image))
    foreign = write_scan(tmp_path, "foreign", (mask.with_voxels(mask.voxels * 3), image))
    (tmp_path / "set" / "labelsTr").mkdir(parents=True)
    (tmp_path / "set" / "dataset.json").write_text('{"labels": {"0": "background", "1": "spleen"}}')
    spleen = tmp_path / "set" / "labelsTr" / "spleen.nii.gz"
    spleen.write_bytes(first.read_bytes())
    for arguments, reason in (
        ((first,), "at least two"),
        ((first, first), "given twice"),
        ((first, tmp_path / "absent.nii.gz"), "no such file"),
        ((first, second, "--dates", "2024-02-01,2024-01-01"), "comes before"),
        ((first, second, "--dates", "2024-02-01,2024-02-01"), "two scans"),
        ((first, second, "--dates", "2024-02-01"), "1 dates for 2"),
        ((first, second, "--dates", "2024-02-01,1.3.2024"), "no date"),
        ((first, empty), "holds no liver"),
        ((empty, first), "holds no liver"),
        ((first, foreign), "label value 3"),
        ((first, spleen), "labels differ"),
        ((first, second, "--organ", "kidney"), "kidney"),
        ((first, second, "--images", first), "1 scans for 2"),
    ):
        code, result, err = call(
            capsys, *arguments, "--registration", "rigid", "--out", tmp_path / "out"
        )
        assert code == EXIT_USER, arguments
        assert reason in result["error"]
        assert sum(line.startswith("liverseg:") for line in err.splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_a_cut_organ_is_said_and_lesions_beyond_are_not_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    balls = [(0.0, 0.0, 24.0, 7.0), (20.0, 5.0, -10.0, 7.0)]
    mask, image = paint_patient(BASELINE, STILL, balls)
    first = write_scan(tmp_path, "one", (mask, image))
    cut = (mask.cropped((0, 0, 0), (33, 60, 64)), image.cropped((0, 0, 0), (33, 60, 64)))
    second = write_scan(tmp_path, "two", cut)
    code, _, err = call(
        capsys,
        first,
        second,
        "--out",
        tmp_path / "out",
        "--registration",
        "rigid",
        "--allow-mismatch",
    )
    assert code == EXIT_DONE
    assert "cuts the liver (superior)" in err
    content = json.loads((tmp_path / "out" / "follow.json").read_text())
    states = {lesion["states"][1] for lesion in content["lesions"]}
    assert states == {"seen", "uncovered"}
    assert content["response"]["recist"] == "NE"


def test_organs_without_lesions_in_another_scheme(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kidney with a cyst, under other numbers."""
    numbers = np.array([0, 4, 9], np.uint8)
    files = []
    for number, radius in enumerate((9.0, 5.2)):
        mask, image = paint_patient(BASELINE, STILL, [(*GROWS, radius)])
        files.append(
            write_scan(tmp_path, f"k{number}", (mask.with_voxels(numbers[mask.voxels]), image))
        )
    labels = ("--labels", "kidney=4,9", "--labels", "cyst=9")
    code, result, _ = call(
        capsys, *files, *labels, "--registration", "rigid", "--out", tmp_path / "out"
    )
    assert (code, result["recist"]) == (EXIT_DONE, "PR")
    assert json.loads((tmp_path / "out" / "follow.json").read_text())["organ"] == "kidney"


def paint_two_organs(kidney_shift_mm: float) -> tuple[Volume, Volume]:
    """A liver with a tumour, and a kidney with a cyst that slides along it."""
    mask, image = paint_patient(BASELINE, STILL, [(*GROWS, 8.0)], (40.0, 44.0, 30.0))
    x, y, z = BASELINE.world_mm(np.indices(BASELINE.shape).reshape(3, -1).T).T
    z = z - kidney_shift_mm
    label = mask.voxels.copy().ravel()
    for radii, (cx, cy, cz), value in (
        ((14.0, 12.0, 26.0), (58.0, -40.0, 5.0), 3),
        ((4.0, 4.0, 4.0), (58.0, -42.0, 16.0), 4),
    ):
        distance = (
            ((x - cx) / radii[0]) ** 2 + ((y - cy) / radii[1]) ** 2 + ((z - cz) / radii[2]) ** 2
        )
        label[(distance <= 1) & ((label == 0) | (label == 3))] = value
    return mask.with_voxels(label.reshape(BASELINE.shape)), image


def test_lesions_are_matched_within_their_own_organ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kidney slides by 20 mm along a liver that stays: its cyst is found again."""
    scans = [
        write_scan(tmp_path, f"s{number}", paint_two_organs(shift))
        for number, shift in enumerate((0.0, -20.0))
    ]
    labels = []
    for text in ("liver=1,2", "tumour=2", "kidney=3,4", "cyst:lesion=4"):
        labels += ["--labels", text]
    out = tmp_path / "out"
    code, _, _ = call(capsys, *scans, *labels, "--registration", "rigid", "--out", out)
    assert code == EXIT_DONE
    content = json.loads((out / "follow.json").read_text())
    assert {one["structure"]: one["status"] for one in content["lesions"]} == {
        "tumour": "persistent",
        "cyst": "persistent",
    }
    (other,) = content["other_registrations"]
    assert (other["organ"], other["scan"]) == ("kidney", 1)
    assert other["dice"] >= 0.9
    assert "kidney" in (out / "follow.html").read_text()


def test_scans_with_a_run(
    small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One scan under two names: every lesion the network finds is found again."""
    source = small_run.source / "imagesTr" / "liver_0.nii.gz"
    scans = []
    for name in ("before", "after"):
        (tmp_path / "in").mkdir(exist_ok=True)
        scans.append(tmp_path / "in" / f"{name}.nii.gz")
        scans[-1].write_bytes(source.read_bytes())
    code, _, _ = call(
        capsys, *scans, "--run", small_run.run, "--registration", "rigid", "--out", tmp_path / "out"
    )
    assert code == EXIT_DONE
    content = json.loads((tmp_path / "out" / "follow.json").read_text())
    assert content["scans"] == ["before", "after"]
    assert {lesion["status"] for lesion in content["lesions"]} <= {"persistent"}
