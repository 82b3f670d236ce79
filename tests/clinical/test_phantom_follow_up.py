"""Phantom patients at several dates: the truth holds in the masks, and `liverseg follow` finds
it."""

import json
from pathlib import Path

import numpy as np
import pytest

from liverseg_dist.clinical.diameters import measure_axial_diameters
from liverseg_dist.commands.follow_cohort import read_patients
from liverseg_dist.commands.main import main
from liverseg_dist.data.io.nifti import read_nifti
from liverseg_dist.errors import EXIT_DONE, EXIT_USER
from liverseg_dist.phantom.follow_up import make_follow_up
from liverseg_dist.volume import Grid
from tools.bench.follow_up import Comparison, compare_patient, merged_axis_mm, true_response


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
    """The proof on 40 pairs (`tools/bench/follow_up.py`), short."""
    found = Comparison()
    for patient in json.loads((patients / "follow_up.json").read_text())["patients"][:2]:
        compare_patient(patient, follow(patients, patient, tmp_path / patient["patient"]), found)
    assert found.wrong == []
    # Two patients: one lesion more or less near the surface moves the mean by half a millimetre.
    assert np.mean(found.errors_mm) <= 2.5
    assert found.wrong_responses == []


def test_the_visits_are_a_table_for_follow(patients: Path) -> None:
    read = {one.patient: one for one in read_patients(patients / "visits.csv")}
    for truth in json.loads((patients / "follow_up.json").read_text())["patients"]:
        one = read[truth["patient"]]
        assert [(date - one.dates[0]).days for date in one.dates] == truth["days"]
        for file in (*one.masks, *one.images):
            assert file is not None
            assert file.is_file()


def test_long_axis_of_two_balls_against_voxels() -> None:
    """The truth for merged lesions: side by side, and one above the other."""
    for offset in ((9.0, 6.0, 0.0), (4.0, 3.0, 8.0), (0.0, 0.0, 10.0)):
        pair = []
        for identity, centre in ((1, (0.0, 0.0, 0.0)), (2, offset)):
            merged = 1 if identity == 2 else None
            pair.append({"identity": identity, "merged_into": merged, "radius_mm": [5.0, 10.0]})
            pair[-1]["centre_mm"] = [[0, 0, 0], list(centre)]
        grid = Grid((90, 90, 90), np.diag([0.5, 0.5, 0.5, 1.0]))
        at = grid.world_mm(np.stack(np.indices(grid.shape), axis=-1)) - 18.0
        mask = (np.linalg.norm(at, axis=-1) <= 10) | (np.linalg.norm(at - offset, axis=-1) <= 10)
        measured = measure_axial_diameters(mask, grid).long_mm
        assert merged_axis_mm(pair, 1, 1.0) == pytest.approx(measured, abs=0.4)


@pytest.mark.parametrize(
    ("radii", "law", "expected"),
    [
        ((10.0, 5.0), "shrink", ("PR", True)),
        ((10.0, 7.1), "shrink", ("SD", False)),
        ((10.0, 10.0), "stable", ("SD", True)),
        ((10.0, 14.0), "grow", ("PD", True)),
        ((10.0, 0.0), "vanish", ("CR", True)),
    ],
)
def test_the_true_response(
    radii: tuple[float, float], law: str, expected: tuple[str, bool]
) -> None:
    lesion = {"identity": 1, "law": law, "radius_mm": list(radii), "merged_into": None}
    before, after = [2 * radii[0]], [2 * radii[1]] if radii[1] else []
    assert true_response([lesion], [1], {1: before[0]}, before, after) == expected
    new = {"identity": 2, "law": "appear", "radius_mm": [0.0, 8.0], "merged_into": None}
    assert true_response([lesion, new], [1], {1: before[0]}, before, after) == ("PD", True)
