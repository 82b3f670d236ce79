"""The fingerprint of data sets on disk: measurements, channels, labels, damage, the cache."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from liverseg_dist.config import load_settings
from liverseg_dist.data.io.nifti import read_nifti, write_image, write_mask
from liverseg_dist.errors import RunFailed, UserError
from liverseg_dist.planning.fingerprint import CaseFingerprint
from liverseg_dist.planning.fingerprint_read import is_dataset_folder, read_fingerprint
from liverseg_dist.volume import Grid
from tests.planning.fingerprints import write_dataset


def test_measurements_of_known_boxes(tmp_path: Path) -> None:
    found = read_fingerprint(write_dataset(tmp_path), workers=2)
    assert [case.case_id for case in found.cases] == ["case_0", "case_1", "case_2"]
    case = found.cases[0]
    assert case.shape == (24, 40, 48)
    assert case.spacing_mm == pytest.approx((5.0, 2.0, 2.0))
    assert case.foreground_mm == pytest.approx((50.0, 40.0, 40.0))
    assert case.structure_voxels == {"liver": 10 * 20 * 20, "tumour": 64}
    # 64 voxels of 20 mm^3 have the volume of a sphere of this diameter.
    diameter = np.cbrt(6 * 64 * 20 / np.pi)
    assert case.lesion_diameters_mm == {"tumour": (pytest.approx(diameter, abs=1e-3),)}
    assert case.intensities[0].mean == pytest.approx(99.2, abs=1)
    assert found.left_out == ()
    assert found.to_summary()["lesions"] == 3
    json.dumps(found.to_summary(), allow_nan=False)


def test_scans_of_other_orientations_give_the_same_figures(tmp_path: Path) -> None:
    plain, turned = tmp_path / "plain", tmp_path / "turned"
    expected = read_fingerprint(write_dataset(plain, cases=1)).cases[0]
    write_dataset(turned, cases=1)
    for name in ("imagesTr/case_0_0000.nii.gz", "labelsTr/case_0.nii.gz"):
        volume = read_nifti(turned / name, "label" if "labels" in name else "image")
        sideways = volume.reoriented("PIR")
        voxels = np.ascontiguousarray(sideways.voxels).astype(np.int16)
        write_image(turned / name, voxels, sideways.grid)
    found = read_fingerprint(turned).cases[0]
    assert replace(found, files=()) == replace(expected, files=())


def test_labels_and_channels_of_any_data_set(tmp_path: Path) -> None:
    index = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "organ": [1, 2], "lesion": 2},
    }
    found = read_fingerprint(write_dataset(tmp_path, 2, index=index, channels=2))
    assert [structure.name for structure in found.scheme.structures] == ["organ", "lesion"]
    assert [channel.intensity for channel in found.channels] == ["zscore", "zscore"]
    assert len(found.cases[0].intensities) == 2
    assert len(found.foreground_percentiles(1, (50,))) == 1


def test_channels_in_one_4d_file(tmp_path: Path) -> None:
    nib = pytest.importorskip("nibabel")
    index = {"modality": {"0": "FLAIR", "1": "T1w"}, "labels": {"0": "background", "1": "liver"}}
    write_dataset(tmp_path, 1, index=index | {"labels": {"0": "b", "1": "liver", "2": "tumour"}})
    index["labels"] = {"0": "background", "1": "liver", "2": "tumour"}
    (tmp_path / "dataset.json").write_text(json.dumps(index))
    first_file = tmp_path / "imagesTr" / "case_0_0000.nii.gz"
    file = first_file.rename(tmp_path / "imagesTr" / "case_0.nii.gz")
    one = nib.load(file)
    voxels = np.asarray(one.dataobj)
    nib.save(nib.Nifti1Image(np.stack([voxels, 2 * voxels], axis=3), one.affine), file)
    found = read_fingerprint(tmp_path).cases[0]
    first, second = found.intensities
    assert second.mean == pytest.approx(2 * first.mean)
    index["modality"] = {"0": "FLAIR", "1": "T1w", "2": "T2w"}
    (tmp_path / "dataset.json").write_text(json.dumps(index))
    with pytest.raises(RunFailed, match="1 of 1 labelled scans cannot be read"):
        read_fingerprint(tmp_path)


def test_one_file_per_structure(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", cases=2)
    folder = tmp_path / "files"
    for number in range(2):
        case = folder / f"s{number}"
        (case / "segmentations").mkdir(parents=True)
        shutil.copy(data / "imagesTr" / f"case_{number}_0000.nii.gz", case / "ct.nii.gz")
        label = read_nifti(data / "labelsTr" / f"case_{number}.nii.gz", "label")
        for name, value in (("spleen", 1), ("liver_tumor", 2)):
            mask = (label.voxels == value).astype(np.uint8)
            write_mask(case / "segmentations" / f"{name}.nii.gz", mask, label.grid)
    assert is_dataset_folder(folder)
    found = read_fingerprint(folder)
    names = [structure.name for structure in found.scheme.structures]
    assert len(names) == 2
    # The lesion lies in the only organ, which then includes it.
    assert sorted(found.cases[0].structure_voxels.values()) == [64, 10 * 20 * 20]


def test_given_channels_and_labels_are_used(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, cases=1)
    convert = load_settings(
        [],
        [
            'convert.channels=[{"name": "T1", "modality": "MR", "intensity": "zscore"}]',
            'convert.labels={"lesion": {"from": ["tumour"], "kind": "lesion"}, "*": "drop"}',
        ],
    ).convert
    found = read_fingerprint(folder, convert=convert)
    assert [structure.name for structure in found.scheme.structures] == ["lesion"]
    assert found.channels[0].modality == "MR"
    assert found.cases[0].structure_voxels == {"lesion": 64}


def test_missing_channel_of_a_case(tmp_path: Path) -> None:
    index = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "liver": 1, "tumour": 2},
    }
    folder = write_dataset(tmp_path, 2, index=index, channels=2)
    (folder / "imagesTr" / "case_1_0001.nii.gz").unlink()
    cache = tmp_path / "found.json"
    found = read_fingerprint(folder, cache=cache)
    assert found.cases[1].intensities[1] is None
    assert found.foreground_percentiles(1, (50,))
    assert read_fingerprint(folder, cache=cache) == found


def test_unreadable_scans_are_named_and_left_out(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, cases=6)
    (folder / "imagesTr" / "case_1_0000.nii.gz").write_bytes(b"not a scan")
    label = read_nifti(folder / "labelsTr" / "case_2.nii.gz", "label")
    grid = Grid((24, 40, 24), label.affine)
    write_image(folder / "imagesTr" / "case_2_0000.nii.gz", np.zeros(grid.shape, np.int16), grid)
    odd = label.voxels.copy()
    odd[0, 0, 0] = 9
    write_image(folder / "labelsTr" / "case_3.nii.gz", odd.astype(np.int16), label.grid)
    found = read_fingerprint(folder)
    reasons = dict(found.left_out)
    assert set(reasons) == {"case_1", "case_2", "case_3"}
    assert "not a NIfTI file" in reasons["case_1"]
    assert "image is 24x40x24 voxels, label 24x40x48" in reasons["case_2"]
    assert "label value 9" in reasons["case_3"]


def test_too_few_readable_scans_fail(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, cases=3)
    for number in (0, 2):
        (folder / "labelsTr" / f"case_{number}.nii.gz").write_bytes(b"\x1f\x8b damaged")
    with pytest.raises(RunFailed, match=r"2 of 3 labelled scans cannot be read.*case_0"):
        read_fingerprint(folder)


def test_folders_that_are_no_labelled_data_set(tmp_path: Path) -> None:
    assert not is_dataset_folder(tmp_path)
    folder = write_dataset(tmp_path / "data", cases=1)
    assert is_dataset_folder(folder)
    shutil.rmtree(folder / "labelsTr")
    with pytest.raises(UserError, match="no training case has a label"):
        read_fingerprint(folder)
    (folder / "dataset.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        read_fingerprint(folder)


def test_cache_is_used_for_unchanged_files_only(tmp_path: Path) -> None:
    folder, cache = write_dataset(tmp_path / "data"), tmp_path / "found.json"
    first = read_fingerprint(folder, cache=cache)
    # A figure that only the file can have shows which cases were taken from it.
    content = json.loads(cache.read_text())
    for entry in content["cases"]:
        entry["foreground_mm"] = [1.0, 2.0, 3.0]
    cache.write_text(json.dumps(content))
    label = folder / "labelsTr" / "case_1.nii.gz"
    label.touch()
    second = read_fingerprint(folder, cache=cache)
    assert second.cases[0].foreground_mm == (1.0, 2.0, 3.0)
    assert second.cases[1].foreground_mm == first.cases[1].foreground_mm
    # Other labels make every entry outdated.
    index = json.loads((folder / "dataset.json").read_text())
    index["labels"]["spleen"] = 3
    (folder / "dataset.json").write_text(json.dumps(index))
    third = read_fingerprint(folder, cache=cache)
    assert third.cases[0].foreground_mm == first.cases[0].foreground_mm


def test_other_files_are_not_overwritten_as_a_cache(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, cases=1)
    with pytest.raises(UserError, match="not a fingerprint that liverseg plan wrote"):
        read_fingerprint(folder, cache=folder / "dataset.json")
    damaged = tmp_path / "cache.json"
    read_fingerprint(folder, cache=damaged)
    content = json.loads(damaged.read_text())
    content["cases"][0]["shape"] = [0, 1, 1]
    damaged.write_text(json.dumps(content))
    with pytest.raises(UserError, match="remove it or name another"):
        read_fingerprint(folder, cache=damaged)


def test_entry_survives_json(tmp_path: Path) -> None:
    case = read_fingerprint(write_dataset(tmp_path, cases=1)).cases[0]
    assert CaseFingerprint.from_json(json.loads(json.dumps(case.to_json()))) == case


def test_nothing_is_written_without_a_cache(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", cases=1)
    before = sorted(tmp_path.rglob("*"))
    read_fingerprint(folder)
    assert sorted(tmp_path.rglob("*")) == before
