"""`liverseg predict` on real files."""

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from liverseg_dist.commands.main import main
from liverseg_dist.data.io.nifti import read_nifti, write_image
from liverseg_dist.volume import Volume
from tests.inference.small_run import SmallRun, train_small_run

ONE_THREAD = ("--device", "cpu", "--threads", "1")


def predict(run: Path, *arguments: object, out: Path) -> int:
    return main(["predict", str(run), *map(str, arguments), "--out", str(out), *ONE_THREAD])


def read_table(out: Path) -> dict[str, dict[str, str]]:
    with open(out / "volumes.csv", newline="") as stream:
        return {row["scan"]: row for row in csv.DictReader(stream)}


def test_masks_have_the_shape_and_affine_of_their_scans(
    small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_run.source / "imagesTr"
    assert predict(small_run.run, folder, out=tmp_path) == 0
    printed = capsys.readouterr().out
    orientations = set()
    for file in sorted(folder.glob("*.nii.gz")):
        image, mask = nib.load(file), nib.load(tmp_path / file.name)
        assert mask.shape == image.shape
        np.testing.assert_allclose(mask.affine, image.affine, atol=1e-5)
        orientations.add(nib.aff2axcodes(image.affine))
        labels = np.asarray(mask.dataobj)
        assert labels.dtype == np.uint8
        assert set(np.unique(labels)) <= {0, 1, 2}
        truth = np.asarray(nib.load(small_run.source / "labelsTr" / file.name).dataobj)
        overlap = ((labels > 0) & (truth > 0)).sum()
        assert 2 * overlap / ((labels > 0).sum() + (truth > 0).sum()) > 0.3
        row = read_table(tmp_path)[file.name.removesuffix(".nii.gz")]
        voxel_ml = abs(np.linalg.det(image.affine[:3, :3])) / 1000
        assert float(row["liver_ml"]) == pytest.approx((labels > 0).sum() * voxel_ml, rel=1e-4)
        assert float(row["tumour_ml"]) == pytest.approx((labels == 2).sum() * voxel_ml, rel=1e-4)
        assert float(row["burden"]) == pytest.approx((labels == 2).sum() / (labels > 0).sum())
        assert f"{row['scan']}: liver {float(row['liver_ml']):.1f} ml" in printed
    assert len(orientations) > 1
    assert not list(tmp_path.glob(".*"))


def test_finished_scans_are_skipped_until_something_changes(
    small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan, out = small_run.source / "imagesTr" / "liver_1.nii.gz", tmp_path / "out"
    copy = tmp_path / "scan.nii.gz"
    copy.write_bytes(scan.read_bytes())
    mask = out / "scan.nii.gz"

    def is_written(*arguments: object) -> bool:
        before = mask.stat().st_mtime_ns if mask.exists() else None
        assert predict(small_run.run, copy, *arguments, out=out) == 0
        return mask.stat().st_mtime_ns != before

    assert is_written()
    assert not is_written()
    assert "done before" in capsys.readouterr().out
    assert is_written("--again")
    assert is_written("inference.overlap=0.2")  # other settings, other masks
    assert not is_written("inference.overlap=0.2", "inference.batch_size=2")
    mask.unlink()
    assert is_written("inference.overlap=0.2")
    image = read_nifti(copy)
    write_image(copy, image.voxels[1:], image.cropped((1, 0, 0), image.voxels[1:].shape).grid)
    assert is_written("inference.overlap=0.2")  # another scan of that name
    assert read_nifti(mask, "label").shape[0] == image.shape[0] - 1


def test_a_damaged_file_does_not_stop_the_others(
    small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = small_run.source / "imagesTr" / "liver_1.nii.gz"
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(good.read_bytes()[:5000])
    out = tmp_path / "out"
    code = predict(small_run.run, broken, tmp_path / "absent.nii", good, "--json", out=out)
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert code == result["exit_code"] == 1
    assert result["failed"] == ["absent", "broken"]
    assert f"{broken}: ends too early" in printed.err
    assert f"{tmp_path / 'absent.nii'}: no such file" in printed.err
    assert "Traceback" not in printed.err
    table = read_table(out)
    assert [table[name]["status"] for name in ("broken", "absent", "liver_1")] == [
        "failed",
        "failed",
        "done",
    ]
    assert sorted(file.name for file in out.glob("*.nii.gz")) == ["liver_1.nii.gz"]


def test_user_mistakes_give_exit_code_2(
    small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = small_run.source / "imagesTr" / "liver_1.nii.gz"
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([tmp_path / "absent.nii.gz"], "no such file"),
        ([tmp_path / "empty"], "holds no .nii"),
        (["inference.overlap=0.5"], "no scan is given"),
        ([scan, "train.max_steps=1"], "takes inference.* only"),
        ([scan, small_run.source / "labelsTr" / "liver_1.nii.gz"], "would both become"),
    ):
        assert predict(small_run.run, *arguments, out=tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    assert predict(small_run.run, scan, out=scan.parent) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_created(
    small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert predict(small_run.run, small_run.source / "imagesTr", out=tmp_path / "file" / "out") == 1
    error = capsys.readouterr().err
    assert "Not a directory" in error
    assert error.count("\n") == 1


def test_probabilities_and_ensembles(small_run: SmallRun, tmp_path: Path) -> None:
    scan = small_run.source / "imagesTr" / "liver_2.nii.gz"
    second = tmp_path / "second"
    train_small_run(second, small_run.store, steps=20, seed=1)
    values = {}
    for name, arguments in {
        "first": (small_run.run,),
        "second": (second,),
        "both": (small_run.run, "--ensemble", second),
    }.items():
        out = tmp_path / f"out_{name}"
        assert predict(*arguments, scan, "--probabilities", out=out) == 0
        values[name] = read_nifti(out / "probabilities" / "liver_2_liver.nii.gz").voxels
        tumour = read_nifti(out / "probabilities" / "liver_2_tumour.nii.gz")
        assert isinstance(tumour, Volume)
        assert values[name].dtype == tumour.voxels.dtype == np.float32
        assert (tumour.voxels <= values[name] + 1e-5).all()
        assert 0 <= values[name].min() < values[name].max() <= 1 + 1e-5
    assert np.abs(values["first"] - values["second"]).max() > 0.05
    np.testing.assert_allclose(values["both"], (values["first"] + values["second"]) / 2, atol=1e-5)
