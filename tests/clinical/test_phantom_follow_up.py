"""Phantom patients at several dates: the truth holds in the masks, and `liverseg follow` finds
it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from liverseg_dist.commands.main import main
from liverseg_dist.data.io.nifti import read_nifti
from liverseg_dist.errors import EXIT_DONE, EXIT_USER
from liverseg_dist.phantom.follow_up import make_follow_up
from tests.clinical.phantom_pairs import Comparison, compare_patient


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patients") / "set"
    assert (
        main(["phantom", str(folder), "--cases", "3", "--follow-up", "1", "--seed", "3"])
        == EXIT_DONE
    )
    return folder


def follow(folder: Path, truth: dict, out: Path) -> dict:
    masks = [str(folder / "labelsTr" / f"{name}.nii.gz") for name in truth["scans"]]
    assert (
        main(["follow", *masks, "--images", str(folder / "imagesTr"), "--out", str(out)])
        == EXIT_DONE
    )
    return json.loads((out / "follow.json").read_text())


def test_the_truth_holds_in_the_masks(patients: Path) -> None:
    truth = json.loads((patients / "follow_up.json").read_text())
    laws = set()
    for patient in truth["patients"]:
        assert patient["days"][0] == 0
        for date, name in enumerate(patient["scans"]):
            label = read_nifti(patients / "labelsTr" / f"{name}.nii.gz", "label")
            for lesion in patient["lesions"]:
                index = np.rint(label.grid.index_of(np.array(lesion["centre_mm"][date]))).astype(
                    int
                )
                is_there = lesion["radius_mm"][date] > 0 or lesion["merged_into"] is not None
                assert (label.voxels[tuple(index)] == 2) == is_there, (name, lesion)
                laws.add(lesion["law"])
    assert len(laws) >= 5


def test_dates_differ_in_slices_and_position() -> None:
    followed = make_follow_up(3, 1, 3, "small", False)
    spacings = [scan.label.grid.spacing_mm for scan in followed.scans]
    assert len(set(spacings)) == 3
    again = make_follow_up(3, 1, 3, "small", False)
    for one, other in zip(followed.scans, again.scans, strict=True):
        assert (one.image.voxels == other.image.voxels).all()
    assert followed.truth(["a", "b", "c"]) == again.truth(["a", "b", "c"])
    assert len(followed.days) == 3


def test_the_same_line_continues(patients: Path) -> None:
    files = sorted((patients / "labelsTr").iterdir())
    before = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    line = ["phantom", str(patients), "--cases", "3", "--follow-up", "1"]
    assert main([*line, "--seed", "3"]) == EXIT_DONE
    assert [(file.stat().st_mtime_ns, file.read_bytes()) for file in files] == before
    assert main([*line, "--seed", "4"]) == EXIT_USER


def test_lesions_are_followed(patients: Path, tmp_path: Path) -> None:
    found = Comparison()
    for patient in json.loads((patients / "follow_up.json").read_text())["patients"][:2]:
        compare_patient(patient, follow(patients, patient, tmp_path / patient["patient"]), found)
    assert found.wrong == []
    # Two patients: one lesion more or less near the surface moves the mean by half a millimetre.
    assert np.mean(found.errors_mm) <= 3.0


@pytest.mark.long
def test_forty_pairs(tmp_path: Path) -> None:
    """98 % of the lesions matched. Centres: 2.06 mm on average over 12 pairs, with voxels of 3
    mm."""
    count = int(os.environ.get("LIVERSEG_FOLLOW_PAIRS", "40"))
    folder = tmp_path / "set"
    assert (
        main(["phantom", str(folder), "--cases", str(count), "--follow-up", "1", "--seed", "11"])
        == EXIT_DONE
    )
    found = Comparison()
    for patient in json.loads((folder / "follow_up.json").read_text())["patients"]:
        compare_patient(patient, follow(folder, patient, tmp_path / patient["patient"]), found)
    print(
        f"{found.right} right, {found.share:.3f}; wrong: {found.wrong}; mean {np.mean(found.errors_mm):.2f} mm"
    )
    assert found.share >= 0.98, found.wrong
    assert np.mean(found.errors_mm) <= 2.2
