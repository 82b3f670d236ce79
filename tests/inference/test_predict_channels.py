"""`liverseg predict` with a run of two channels and four classes: files, absences, refusals."""

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from liverseg_dist.commands.main import main
from liverseg_dist.config import ChannelConfig, load_settings
from liverseg_dist.inference.structure_values import describe_structures
from liverseg_dist.label_scheme import read_label_scheme
from liverseg_dist.labels import LabelScheme, Structure
from liverseg_dist.model import build_model
from liverseg_dist.model.topology import resolve_topology

LABELS = LabelScheme(
    ((0, "background"), (1, "liver"), (2, "tumour"), (3, "spleen"), (255, "ignore")),
    (
        Structure("liver", (1, 2)),
        Structure("tumour", (2,), "lesion", "liver"),
        Structure("spleen", (3,)),
    ),
)
CHANNELS = (ChannelConfig(name="CT"), ChannelConfig(name="T1", modality="MR", intensity="zscore"))
ONE_THREAD = ("--device", "cpu", "--threads", "1")


def write_run(folder: Path, dropout: float, optional: tuple[str, ...] = ()) -> Path:
    """A run with random weights, as training writes it."""
    topology = [
        "model.features=[4,8]",
        "model.strides=[[1,1,1],[4,4,4]]",
        "model.kernels=[[3,3,3],[3,3,3]]",
        "model.blocks_per_level=1",
        "model.deep_supervision=false",
        "model.in_channels=2",
        f"model.out_channels={LABELS.num_classes}",
        "data.patch_size=[32,32,32]",
        "inference.overlap=0.1",
        f"train.modality_dropout={dropout}",
    ]
    settings = load_settings([], topology)
    spacing_mm = (6.0, 8.0, 8.0)
    ct = {"lower_hu": -100.0, "upper_hu": 250.0, "mean": 0.5, "std": 0.2}
    content = yaml.safe_load(settings.to_yaml())
    content["data"] |= {
        "spacing_mm": list(spacing_mm),
        "intensity": [ct, None],
        "channels": [channel.model_dump(mode="json") for channel in CHANNELS],
        "optional_channels": list(optional),
        "labels": LABELS.to_json(),
    }
    model_config = resolve_topology(settings.model, (32, 32, 32), spacing_mm)
    content["model"] = model_config.model_dump(mode="json")
    torch.manual_seed(0)
    folder.mkdir()
    save_file(build_model(model_config).state_dict(), folder / "model.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "ct_mr", dropout=0.3)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CT (`_0000`) and MR (`_0001`) of two patients, on different grids."""
    folder = tmp_path_factory.mktemp("phantoms") / "both"
    words = ["--modality", "ct+mr", "--organs", "liver,spleen", "--size", "small"]
    assert main(["phantom", str(folder), "--cases", "2", "--seed", "3", *words]) == 0
    return folder / "imagesTr"


def predict(run: Path, *arguments: object, out: Path) -> int:
    return main(["predict", str(run), *map(str, arguments), "--out", str(out), *ONE_THREAD])


def read_table(out: Path) -> dict[str, dict[str, str]]:
    with open(out / "volumes.csv", newline="") as stream:
        return {row["scan"]: row for row in csv.DictReader(stream)}


def find_files(scans: Path) -> tuple[str, Path, Path]:
    first = min(scans.glob("*_0000.nii.gz"))
    name = first.name.removesuffix("_0000.nii.gz")
    return name, first, scans / f"{name}_0001.nii.gz"


def test_a_folder_of_two_channels(
    run: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(run, scans, "--probabilities", out=tmp_path) == 0
    printed = capsys.readouterr().out
    table = read_table(tmp_path)
    name, first, _ = find_files(scans)
    assert len(table) == 2
    assert list(table[name]) == [
        "scan", "status", "liver_ml", "tumour_ml", "spleen_ml", "tumour_burden", "tumour_count",
        "channels", "warnings", "mask", "error",
    ]  # fmt: skip
    assert table[name]["channels"] == "CT | T1"
    assert "from CT, T1" in printed
    mask, image = nib.load(tmp_path / f"{name}.nii.gz"), nib.load(first)
    assert mask.shape == image.shape
    values = np.asarray(mask.dataobj)
    assert set(np.unique(values)) <= {0, 1, 2, 3}
    voxel_ml = abs(np.linalg.det(image.affine[:3, :3])) / 1000
    spleen_ml = (values == 3).sum() * voxel_ml
    assert float(table[name]["spleen_ml"]) == pytest.approx(spleen_ml, rel=1e-4)
    labels = read_label_scheme(tmp_path / "dataset.json")
    assert describe_structures(labels) == describe_structures(LABELS)
    assert json.loads((tmp_path / "dataset.json").read_text())["labels"]["liver"] == [1, 2]
    assert (tmp_path / "probabilities" / f"{name}_spleen.nii.gz").is_file()


def test_missing_channels_are_named(
    run: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, first, second = find_files(scans)
    assert predict(run, first, out=tmp_path / "ct") == 0
    assert "from CT without T1" in capsys.readouterr().out
    assert read_table(tmp_path / "ct")[name]["channels"] == "CT"
    assert predict(run, "--channel", f"t1={second}", out=tmp_path / "mr") == 0
    assert "from T1 without CT" in capsys.readouterr().out
    mask = tmp_path / "mr" / f"{second.name.removesuffix('.nii.gz')}.nii.gz"
    assert nib.load(mask).shape == nib.load(second).shape
    both = [*("--channel", f"CT={first}"), *("--channel", f"T1={second}")]
    assert predict(run, *both, out=tmp_path / "both") == 0
    assert predict(run, scans, out=tmp_path / "folder") == 0
    masks = []
    for folder in ("both", "folder", "ct"):
        masks.append(np.asarray(nib.load(tmp_path / folder / f"{name}.nii.gz").dataobj))
    assert np.array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any()


def test_a_file_of_four_dimensions_has_all_channels(run: Path, scans: Path, tmp_path: Path) -> None:
    _, first, _ = find_files(scans)
    image = nib.load(first)
    ct = np.asarray(image.dataobj).astype(np.float32)
    arbitrary_units = np.abs(ct + 1000) * 0.37
    stacked = np.stack([ct, arbitrary_units], axis=-1).astype(np.float32)
    nib.save(nib.Nifti1Image(stacked, image.affine), tmp_path / "scan.nii.gz")
    assert predict(run, tmp_path / "scan.nii.gz", out=tmp_path / "out") == 0
    assert read_table(tmp_path / "out")["scan"]["channels"] == "CT | T1"


def test_what_a_run_was_not_trained_for_is_refused_by_name(
    run: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, first, second = find_files(scans)
    swapped_mr, swapped_ct = tmp_path / "a_0000.nii.gz", tmp_path / "b_0001.nii.gz"
    third = tmp_path / "c_0002.nii.gz"
    swapped_mr.symlink_to(second)
    swapped_ct.symlink_to(first)
    third.symlink_to(second)
    strict = write_run(tmp_path / "strict", dropout=0.0)
    without_mr = write_run(tmp_path / "without_mr", dropout=0.0, optional=("T1",))
    both = "run needs CT, T1"
    cases: list[tuple[Path, list[object], int, str]] = [
        (run, ["--channel", f"PET={second}"], 2, "its channels are CT, T1"),
        (run, ["--channel", f"T1={second}", first], 2, "give no other scans"),
        (run, [third], 2, "is channel 2 (counted from 0), but the run has 2: CT, T1"),
        (run, [swapped_mr], 1, "CT: "),
        (run, [swapped_ct], 1, "trained on T1 (MR), but the values are those of a CT"),
        (run, [second, "inference.largest_component=[pancreas]"], 2, "no structure is called"),
        (strict, [first], 2, both),
        (strict, ["--channel", f"T1={second}"], 2, "has T1, the " + both),
        (without_mr, ["--channel", f"T1={second}"], 2, "it may lack T1; add CT"),
        (without_mr, [first], 0, ""),
    ]
    for number, (used, arguments, code, message) in enumerate(cases):
        assert predict(used, *arguments, out=tmp_path / f"out{number}") == code, arguments
        assert message in capsys.readouterr().err


def test_masks_of_other_labels_are_not_mixed(
    run: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "kidney": 1}}')
    assert predict(run, scans, out=tmp_path) == 2
    error = capsys.readouterr().err
    assert "1 kidney" in error
    assert "3 spleen" in error
    assert not (tmp_path / "volumes.csv").exists()
