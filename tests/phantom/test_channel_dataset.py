"""`liverseg phantom` with modality, structures and layout: folders, continuation, mistakes."""

import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from liverseg_dist.commands.main import main
from liverseg_dist.label_scheme import read_label_scheme
from liverseg_dist.phantom.channel_case import Recipe
from liverseg_dist.phantom.channel_dataset import ChannelSet, write_channel_set
from liverseg_dist.phantom.organ_labels import parse_organs
from liverseg_dist.phantom.scan import make_scan

BOTH = ["--modality", "ct+mr", "--organs", "liver,spleen,kidneys", "--seed", "3"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cases and a test case with CT and MR; each case may lack one channel. Read only."""
    folder = tmp_path_factory.mktemp("phantom") / "both"
    line = ["phantom", str(folder), *BOTH, "--cases", "2", "--test-cases", "1"]
    assert main([*line, "--missing-channel", "0.5"]) == 0
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.*"))
    }


def test_folder_is_that_of_nnunet(both: Path) -> None:
    index = json.loads((both / "dataset.json").read_text())
    assert index["channel_names"] == {"0": "CT", "1": "MR"}
    assert index["labels"] == {
        "background": 0, "liver": [1, 2], "tumour": 2, "spleen": 3, "kidney_right": 4,
        "kidney_left": 5,
    }  # fmt: skip
    assert index["regions_class_order"] == [1, 2, 3, 4, 5]
    assert (index["numTraining"], index["file_ending"]) == (2, ".nii.gz")
    scheme = read_label_scheme(both / "dataset.json")
    assert scheme.structure("tumour").inside == "liver"
    truths = json.loads((both / "truth.json").read_text())["cases"]
    assert len(truths) == 3
    expected = {"dataset.json", "phantom.json", "truth.json"}
    for truth in truths:
        kind = "Ts" if "volumes_ml" not in truth else "Tr"
        expected.add(f"truth/{truth['case']}.json")
        if kind == "Tr":
            expected.add(f"labelsTr/{truth['case']}.nii.gz")
        for channel, name in enumerate(("CT", "MR")):
            if truth["channels"][name]:
                expected.add(f"images{kind}/{truth['case']}_{channel:04d}.nii.gz")
    assert set(hashes(both)) == expected
    # One of the three cases or more lacks a channel.
    assert 1 <= sum(not all(truth["channels"].values()) for truth in truths) <= 2


def test_files_agree_with_the_truth(both: Path) -> None:
    for truth in json.loads((both / "truth.json").read_text())["cases"][:2]:
        names = [name for name, is_present in truth["channels"].items() if is_present]
        label = nib.load(both / "labelsTr" / f"{truth['case']}.nii.gz")
        for name in names:
            suffix = {"CT": "_0000", "MR": "_0001"}[name]
            image = nib.load(both / "imagesTr" / f"{truth['case']}{suffix}.nii.gz")
            assert image.get_data_dtype() == np.int16
            assert list(image.shape[::-1]) == truth["grids"][name]["shape_zyx"]
            is_reference = name == names[0]
            assert is_reference == (
                image.shape == label.shape and np.allclose(image.affine, label.affine)
            )
        voxels = np.asanyarray(label.dataobj)
        voxel_ml = abs(np.linalg.det(label.affine[:3, :3])) / 1000
        assert (voxels == 3).sum() * voxel_ml == pytest.approx(
            truth["volumes_ml"]["spleen"], rel=1e-3
        )
        assert np.isin(voxels, (1, 2)).sum() * voxel_ml == pytest.approx(
            truth["volumes_ml"]["liver"], rel=1e-3
        )
        shift = np.array(truth["mr_from_ct"]) - np.eye(4)
        assert np.abs(shift).max() > 0.1


def test_same_line_gives_same_bytes_and_continues(both: Path, tmp_path: Path) -> None:
    line = [
        "phantom",
        str(tmp_path / "set"),
        *BOTH,
        "--test-cases",
        "1",
        "--missing-channel",
        "0.5",
    ]
    assert main([*line, "--cases", "1"]) == 0
    assert main([*line, "--cases", "2", "--workers", "2"]) == 0
    assert hashes(tmp_path / "set") == hashes(both)
    # A case without its truth file was stopped: it is made again, the others are kept.
    (tmp_path / "set" / "truth" / "abdomen_1.json").unlink()
    kept = next((tmp_path / "set" / "imagesTr").glob("abdomen_0_*"))
    written = kept.stat().st_mtime_ns
    assert main([*line, "--cases", "2", "--montage", str(tmp_path / "look.png")]) == 0
    assert hashes(tmp_path / "set") == hashes(both)
    assert kept.stat().st_mtime_ns == written
    with Image.open(tmp_path / "look.png") as picture:
        assert np.asarray(picture).std() > 15


def test_mr_of_the_liver_has_the_layout_of_the_decathlon(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    line = ["phantom", str(tmp_path / "mr"), "--modality", "MR", "--cases", "1", "--json"]
    assert main([*line, "--montage", str(tmp_path / "look.png")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["cases"][0]["channels"] == {"MR": True}
    index = json.loads((tmp_path / "mr" / "dataset.json").read_text())
    assert index["modality"] == {"0": "MR"}
    assert index["labels"] == {"0": "background", "1": "liver", "2": "cancer"}
    assert index["tensorImageSize"] == "3D"
    image = nib.load(tmp_path / "mr" / index["training"][0]["image"])
    voxels = np.asanyarray(image.dataobj)
    # Magnitudes: no value below zero, noise instead of -1000 around the body.
    assert voxels.min() >= 0
    assert 0 < np.median(voxels[:, :3]) < 0.2 * np.percentile(voxels, 95)


def test_registered_channels_are_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "four"
    line = ["phantom", str(folder), "--modality", "ct+mr", "--mr-sequence", "gre,tse,pd"]
    line += ["--layout", "msd4d", "--cases", "1", "--montage", str(tmp_path / "look.png")]
    assert main(line) == 0
    index = json.loads((folder / "dataset.json").read_text())
    assert index["modality"] == {
        "0": "CT", "1": "MR T1 GRE", "2": "MR T2 TSE", "3": "MR PD TSE",
    }  # fmt: skip
    assert index["tensorImageSize"] == "4D"
    image, label = (nib.load(folder / index["training"][0][key]) for key in ("image", "label"))
    assert image.shape == (*label.shape, 4)
    np.testing.assert_array_equal(image.affine, label.affine)
    # Rotations are stored as float32 quaternions.
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=5e-3)
    assert image.header.get_xyzt_units()[0] == "mm"
    voxels = np.asanyarray(image.dataobj)
    assert voxels[..., 0].min() < -900
    assert voxels[..., 1:].min() >= 0
    with Image.open(tmp_path / "look.png") as picture:
        assert picture.size[0] == 4 * 3 * 330


def test_partly_labelled_sets_are_of_the_same_patients(tmp_path: Path) -> None:
    line = ["--organs", "liver,spleen,kidneys", "--cases", "1", "--seed", "3"]
    names = {"liver": "liver,tumour", "organs": "spleen,kidneys", "complete": None}
    for name, annotated in names.items():
        option = ["--annotate", annotated] if annotated else []
        assert main(["phantom", str(tmp_path / name), *line, *option]) == 0
    labels, images = {}, {}
    for name in names:
        label = nib.load(tmp_path / name / "labelsTr" / "abdomen_0.nii.gz")
        labels[name] = np.asanyarray(label.dataobj)
        images[name] = (tmp_path / name / "imagesTr" / "abdomen_0_0000.nii.gz").read_bytes()
    assert images["liver"] == images["organs"] == images["complete"]
    scheme = read_label_scheme(tmp_path / "organs" / "dataset.json")
    assert [s.name for s in scheme.structures] == ["spleen", "kidney_right", "kidney_left"]
    complete = read_label_scheme(tmp_path / "complete" / "dataset.json")
    for structure in scheme.structures:
        np.testing.assert_array_equal(
            scheme.mask_of(labels["organs"], structure),
            complete.mask_of(labels["complete"], structure.name),
        )
    np.testing.assert_array_equal(
        labels["liver"], np.where(labels["complete"] < 3, labels["complete"], 0)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modality", "pet"], "--modality pet: not known; known names: ct, mr, ct+mr"),
        (["--organs", "liver,heart"], "'heart' is not known; known names: liver, spleen"),
        (["--organs", ""], "is not known; known names: liver"),
        (["--annotate", "spleen"], "'spleen' is not known; known names: liver, tumour"),
        (["--modality", "mr", "--mr-sequence", "dwi"], "dwi: not known; known names: gre, tse, pd"),
        (["--modality", "mr", "--mr-sequence", "gre,gre"], "gre is given twice"),
        (["--mr-sequence", "gre"], "--mr-sequence needs --modality mr or ct+mr"),
        (["--layout", "bids"], "--layout bids: not known; known names: msd, nnunet, msd4d"),
        (["--modality", "ct+mr", "--layout", "msd"], "holds one channel, not 2"),
        (["--layout", "msd4d"], "holds 2 to 4 channels, not 1"),
        (["--misalignment-mm", "5"], "needs --modality ct+mr"),
        (["--modality", "ct+mr", "--misalignment-mm", "-1"], "must be 0 to 50, not -1"),
        (["--modality", "ct+mr", "--misalignment-mm", "nan"], "must be 0 to 50, not nan"),
        (["--modality", "ct+mr", "--layout", "msd4d", "--misalignment-mm", "5"], "registered"),
        (["--missing-channel", "0.2"], "needs two channels or more"),
        (["--modality", "ct+mr", "--missing-channel", "1.5"], "must be 0 to 1, not 1.5"),
        (["--modality", "ct+mr", "--missing-channel", "nan"], "must be 0 to 1, not nan"),
        (["--benign-lesions", "-1"], "--benign-lesions must be 0 to 10"),
        (["--modality", "mr", "--follow-up", "1"], "--follow-up makes CTs of the liver only"),
    ],
)
def test_mistake_is_one_line_and_makes_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    assert main(["phantom", str(tmp_path / "set"), "--cases", "1", *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "set").exists()


def test_other_settings_do_not_share_a_folder(both: Path, capsys: pytest.CaptureFixture) -> None:
    before = hashes(both)
    line = ["phantom", str(both), "--cases", "2", "--test-cases", "1", "--missing-channel", "0.5"]
    for change in (["--misalignment-mm", "0"], ["--seed", "4"], ["--benign-lesions", "0"]):
        assert main([*line, *BOTH, *change]) == 2
        assert "contains phantoms with the settings" in capsys.readouterr().err
    assert main(["phantom", str(both), "--cases", "2"]) == 2
    assert main([*line, *BOTH, "--cases", "1"]) == 2
    assert "more scan files than requested" in capsys.readouterr().err
    assert hashes(both) == before


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["phantom", str(tmp_path / "set"), *BOTH, "--cases", "2", "--dry-run"]) == 0
    assert (
        "would make 2 labelled and 0 unlabelled small cases of CT + MR" in capsys.readouterr().out
    )
    assert not (tmp_path / "set").exists()


def test_default_set_has_todays_voxels() -> None:
    """Samples of the scans that seed 3 gave when the set had CT and liver only."""
    expected = json.loads((Path(__file__).parent / "default_set.json").read_text())
    for case in expected:
        scan = make_scan(case["seed"], case["number"], "small", case["hard"])
        assert list(scan.image.shape) == case["shape"]
        np.testing.assert_allclose(scan.image.affine, case["affine"], atol=1e-6)
        samples = scan.image.voxels.ravel()[:: case["step"]]
        # Floating-point functions may differ in the last digit between processors.
        np.testing.assert_allclose(samples, case["samples"], atol=1)
        counts = np.bincount(scan.label.voxels.ravel(), minlength=3)
        np.testing.assert_allclose(counts, case["label_voxels"], atol=2)


@pytest.mark.long
def test_full_size_mr_has_all_structures(tmp_path: Path) -> None:
    recipe = Recipe("mr", ("gre",), parse_organs("all"), seed=1, size="full")
    made = write_channel_set(
        ChannelSet(tmp_path / "set", 1, 0, recipe, "nnunet"), 1, lambda _: None
    )
    z, y, x = made[0]["grids"]["MR"]["spacing_mm_zyx"]
    assert 3 <= z <= 8
    assert 1 < y == x < 1.5
    for name in ("liver", "spleen", "kidney_right", "stomach", "pancreas", "aorta", "colon"):
        assert made[0]["volumes_ml"][name] > 10
