"""`liverseg score` end to end on small NIfTI files."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from liverseg_dist.commands.main import main
from liverseg_dist.errors import RunFailed
from liverseg_dist.evaluation import aggregate_scores, score_case
from liverseg_dist.evaluation.pairing import pair_masks
from liverseg_dist.evaluation.score_folders import ScoreJob, open_ledger, score_pairs
from tests.evaluation.masks import dying_reader, labels

AFFINE_RAS = np.array([[0.9, 0, 0, -20.0], [0, 0.7, 0, 5.0], [0, 0, 2.5, 100.0], [0, 0, 0, 1]])
SPACING_MM = (2.5, 0.7, 0.9)


def save(
    file: Path, mask_zyx: np.ndarray, affine: np.ndarray = AFFINE_RAS, orientation: str = "RAS"
) -> None:
    """Write a mask given in z, y, x, stored in `orientation`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.ascontiguousarray(mask_zyx.T), affine)
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
    )
    nib.save(image.as_reoriented(turn), file)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Three predicted and three true masks, stored under different names and in different orientations."""
    prediction, truth = tmp_path / "pred", tmp_path / "truth"
    for seed, (name, orientation) in enumerate(
        (("a.nii.gz", "RAS"), ("b_0000.nii", "LPS"), ("c.nii.gz", "SPL"))
    ):
        save(prediction / name, labels(seed + 50), orientation=orientation)
        save(truth / f"{name[0]}.nii.gz", labels(seed))
    return prediction, truth, tmp_path / "out"


def score(*arguments: object) -> int:
    return main(["score", *(str(argument) for argument in arguments)])


def result(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("workers", [1, 2])
def test_files_have_the_scores_of_their_arrays(
    folders: tuple[Path, Path, Path], workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    prediction, truth, out = folders
    assert score(prediction, truth, "--out", out, "--workers", workers, "--json") == 0
    answer = result(capsys)
    assert (answer["n_cases"], answer["failed"], answer["missing"]) == (3, {}, [])
    summary = json.loads((out / "summary.json").read_text())
    expected = aggregate_scores(
        score_case(name, labels(seed + 50), labels(seed), SPACING_MM)
        for seed, name in enumerate("abc")
    )
    for structure in ("liver", "tumour"):
        for key in ("dice_per_case", "dice_global", "rvd", "assd_mm", "hd95_mm", "nsd_2mm"):
            assert summary[structure][key] == pytest.approx(
                expected[structure][key], rel=1e-5
            )  # float32 header
    assert (
        summary["tumour"]["detection"]["iou_0"]["tp"]
        == expected["tumour"]["detection"]["iou_0"]["tp"]
    )
    assert len((out / "cases.csv").read_text().splitlines()) == 7
    assert (out / "lesions.csv").is_file()
    assert (out / "report.html").read_text().count('<canvas class="surface"') == 3


def test_results_are_the_same_for_any_number_of_workers(folders: tuple[Path, Path, Path]) -> None:
    prediction, truth, out = folders
    for workers in (1, 2):
        score(prediction, truth, "--out", out / str(workers), "--workers", workers)
    for name in ("summary.json", "cases.csv", "lesions.csv", "report.html"):
        assert (out / "1" / name).read_bytes() == (out / "2" / name).read_bytes()


def test_second_run_scores_only_changed_cases(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    prediction, truth, out = folders
    arguments = (prediction, truth, "--out", out, "--workers", 1, "--json", "--no-pictures")
    score(*arguments)
    first = json.loads((out / "summary.json").read_text())
    score(*arguments)
    assert result(capsys)["reused"] == 3
    assert json.loads((out / "summary.json").read_text()) == first
    save(prediction / "a.nii.gz", labels(0))
    score(*arguments)
    assert result(capsys)["reused"] == 2
    assert json.loads((out / "ledger" / "a.json").read_text())["scores"]["liver"]["dice"] == 1.0
    score(*arguments, "--connectivity", 26)
    assert result(capsys)["reused"] == 0


def test_result_after_kill_and_restart_is_identical(folders: tuple[Path, Path, Path]) -> None:
    prediction, truth, out = folders
    score(prediction, truth, "--out", out / "whole", "--workers", 1)
    command = [
        sys.executable,
        "-m",
        "liverseg_dist",
        "score",
        prediction,
        truth,
        "--out",
        out / "cut",
        "--workers",
        1,
    ]
    with subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
        end = time.monotonic() + 60
        while (
            run.poll() is None
            and not list((out / "cut").glob("ledger/*.json"))
            and time.monotonic() < end
        ):
            time.sleep(0.001)
        run.kill()
    assert list((out / "cut").glob("ledger/*.json"))
    assert score(prediction, truth, "--out", out / "cut", "--workers", 1) == 0
    for name in ("summary.json", "cases.csv", "lesions.csv", "report.html"):
        assert (out / "whole" / name).read_bytes() == (out / "cut" / name).read_bytes()


def test_killed_worker_is_reported(folders: tuple[Path, Path, Path]) -> None:
    prediction, truth, out = folders
    job = ScoreJob(open_ledger(out / "ledger", 6, False), dying_reader)
    with pytest.raises(RunFailed, match="a worker died"):
        list(score_pairs(pair_masks(prediction, truth).pairs, job, workers=2))


def test_another_size_is_refused_and_the_rest_is_scored(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    prediction, truth, out = folders
    save(prediction / "a.nii.gz", labels(0)[1:])
    assert score(prediction, truth, "--out", out, "--workers", 1, "--no-pictures") == 2
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("liverseg:")
    ]
    assert str(prediction / "a.nii.gz") in line
    assert str(truth / "a.nii.gz") in line
    assert "23x26x19" in line
    assert "23x26x20" in line
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["n_cases"], list(summary["failed"])) == (2, ["a"])


def test_another_position_is_refused_without_ignore_affine(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    prediction, truth, out = folders
    moved = AFFINE_RAS.copy()
    moved[0, 3] += 7
    save(prediction / "a.nii.gz", labels(50), moved)
    arguments = (prediction / "a.nii.gz", truth / "a.nii.gz", "--out", out, "--no-pictures")
    assert score(*arguments) == 2
    assert "their positions differ by up to 7.0 mm" in capsys.readouterr().err
    assert score(*arguments, "--ignore-affine") == 0
    dice = json.loads((out / "summary.json").read_text())["liver"]["dice_per_case"]
    assert dice == score_case("a", labels(50), labels(0), SPACING_MM)["liver"]["dice"]


def test_damaged_file_does_not_stop_the_others(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    prediction, truth, out = folders
    (prediction / "a.nii.gz").write_bytes((prediction / "a.nii.gz").read_bytes()[:200])
    assert score(prediction, truth, "--out", out, "--workers", 2, "--no-pictures", "--json") != 0
    answer = result(capsys)
    assert answer["n_cases"] == 2
    assert str(prediction / "a.nii.gz") in answer["failed"]["a"]


def test_missing_predictions_are_listed_and_fail(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    prediction, truth, out = folders
    (prediction / "a.nii.gz").unlink()
    save(prediction / "extra.nii.gz", labels(3))
    arguments = (prediction, truth, "--out", out, "--no-pictures", "--json", "--workers", 1)
    assert score(*arguments) == 1
    answer = result(capsys)
    assert (answer["n_cases"], answer["missing"], answer["extra"]) == (2, ["a"], ["extra"])
    assert json.loads((out / "summary.json").read_text())["failed"] == {"a": "no prediction"}
    assert score(*arguments, "--allow-missing") == 0


def test_unknown_labels_are_refused(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    prediction, truth, out = folders
    save(prediction / "a.nii.gz", labels(0) + 1)
    assert score(prediction, truth, "--out", out, "--no-pictures", "--workers", 1) == 2
    assert "the prediction has label 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p, t: shutil.rmtree(p), "no such folder"),
        (lambda p, t: [f.unlink() for f in p.iterdir()], "holds no .nii"),
        (
            lambda p, t: [f.rename(p / f"x{f.name}") for f in list(p.iterdir())],
            "no two masks have the same name",
        ),
        (lambda p, t: shutil.copy(p / "a.nii.gz", p / "a_0000.nii.gz"), "are the same case"),
    ],
)
def test_user_errors_are_one_line(
    folders: tuple[Path, Path, Path], make: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prediction, truth, out = folders
    make(prediction, truth)  # type: ignore[operator]
    assert score(prediction, truth, "--out", out) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_lits_names_are_matched(tmp_path: Path) -> None:
    save(tmp_path / "pred" / "test-segmentation-7.nii", labels(1))
    save(tmp_path / "truth" / "segmentation-7.nii", labels(1))
    assert (
        score(tmp_path / "pred", tmp_path / "truth", "--out", tmp_path / "out", "--no-pictures")
        == 0
    )


def test_ct_behind_the_masks(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    prediction, truth, out = folders
    images = truth.parent / "images"
    save(images / "a_0000.nii.gz", np.full(labels(0).shape, 60, dtype=np.int16), orientation="LPS")
    save(images / "b_0000.nii.gz", np.full((4, 4, 4), 60, dtype=np.int16))
    assert score(prediction, truth, "--out", out, "--images", images, "--workers", 1) == 0
    has_ct = {}
    for name in "abc":
        pictures = json.loads((out / "pictures" / f"{name}.json").read_text())
        has_ct[name] = pictures["slices"]["ct"] is not None
    assert has_ct == {"a": True, "b": False, "c": False}
    assert "not on the grid of its mask" in capsys.readouterr().err


def test_report_and_compare_read_what_score_wrote(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    prediction, truth, out = folders
    score(prediction, truth, "--out", out / "a", "--no-pictures", "--workers", 1)
    score(truth, truth, "--out", out / "b", "--no-pictures", "--workers", 1)
    (out / "a" / "report.html").unlink()
    assert main(["report", str(out / "a")]) == 0
    assert (out / "a" / "report.html").is_file()
    assert main(["compare", str(out / "a"), str(out / "b"), "--out", str(out / "c"), "--json"]) == 0
    liver_dice = result(capsys)["metrics"][0]
    assert (liver_dice["mean_b"], liver_dice["better"]) == (1.0, 3)
    assert json.loads((out / "c" / "comparison.json").read_text())["n_cases"] == 3


def write_labels(folder: Path, values: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps({"labels": values}))


def test_structures_are_compared_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Value 2 is the spleen in the predictions and a tumour in the truth; kidneys are known to
    the predictions only, tumours to the truth only."""
    prediction, truth, out = tmp_path / "pred", tmp_path / "truth", tmp_path / "out"
    truth_mask = labels(0)
    truth_mask[0, :5, :5] = 3
    write_labels(truth, {"background": 0, "liver": [1, 2], "tumour": 2, "Spleen": 3})
    save(truth / "a.nii.gz", truth_mask)
    predicted = np.array([0, 1, 1, 2], np.uint8)[truth_mask]
    predicted[3, :2, :2] = 3
    write_labels(prediction, {"background": 0, "liver": 1, "spleen": 2, "kidney": 3})
    save(prediction / "a.nii.gz", predicted)
    arguments = (prediction, truth, "--out", out, "--workers", 1, "--json")
    assert score(*arguments) == 0
    captured = capsys.readouterr()
    assert "no such structure: tumour" in captured.err
    summary = json.loads((out / "summary.json").read_text())
    # Computed here from its definition. The predicted kidney replaces a part of the liver.
    liver, found = np.isin(truth_mask, (1, 2)), predicted == 1
    dice = 2 * (liver & found).sum() / (liver.sum() + found.sum())
    assert summary["liver"]["dice_per_case"] == pytest.approx(dice)
    assert summary["Spleen"]["dice_per_case"] == 1.0
    rows = (out / "cases.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == ["liver", "Spleen"]


def test_predictions_without_a_common_structure_are_refused(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    prediction, truth, out = folders
    write_labels(prediction, {"background": 0, "spleen": 1, "aorta": 2})
    assert score(prediction, truth, "--out", out) == 2
    error = capsys.readouterr().err
    assert "spleen, aorta against liver, tumour" in error
    assert error.count("\n") == 1
