"""Networks of nnU-Net v2 as runs: masks equal to those of nnU-Net, and folders that are refused."""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from liverseg_dist.commands.main import main
from liverseg_dist.errors import UserError
from liverseg_dist.inference.load_run import build_predictor, load_run
from liverseg_dist.inference.nnunet_run import build_run_settings
from liverseg_dist.model.nnunet_folder import NnunetFolder
from tests.conftest import ROOT
from tests.nnunet_results import BLOCKS, compute_logits, make_plans, make_tensors, write_results

SPACING_XYZ = (3.0, 6.0, 4.0)
"""That of the plans, in NIfTI's order of axes."""
HALF_PRECISION_MARGIN = 0.02
"""nnU-Net sums logits in half precision: where two classes are closer than this, either may win."""


def make_image(shape: tuple[int, ...]) -> np.ndarray:
    """Smooth HU values, within and outside of the normalisation's range."""
    noise = gaussian_filter(np.random.default_rng(0).normal(size=shape), 2)
    return np.rint(noise / noise.std() * 60 + 90).astype(np.int16)


def write_scan(path: Path, zoom: float) -> Path:
    affine = np.diag([*(mm * zoom for mm in SPACING_XYZ), 1])
    nib.save(nib.Nifti1Image(make_image((40, 24, 30)), affine), path)
    return path


def read_mask(path: Path) -> np.ndarray:
    return np.asarray(nib.Nifti1Image.from_filename(path).dataobj).astype(np.uint8)


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_window_has_nnunets_mask(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One window, smaller than the patch along z: nnU-Net's padding, mirroring and normalisation."""
    root = write_results(tmp_path, kind)
    assert main(["nnunet", str(root), str(tmp_path / "run")]) == 0
    assert "licence of its training data: CC-BY-SA 4.0" in capsys.readouterr().out
    run = load_run(tmp_path / "run", torch.device("cpu"))
    predictor = build_predictor([run], torch.device("cpu"))
    hu_zyx = make_image((12, 8, 24))
    found = predictor.predict_labels(hu_zyx, run.settings.data.intensities)

    figures = make_plans()["foreground_intensity_properties_per_channel"]["0"]
    clipped = np.clip(hu_zyx, figures["percentile_00_5"], figures["percentile_99_5"])
    image = np.pad((clipped - figures["mean"]) / figures["std"], ((2, 2), (0, 0), (0, 0)))
    # The plans have the file's second axis in front.
    x = torch.from_numpy(image.transpose(1, 0, 2)).float()[None, None]
    tensors, total = make_tensors(kind), torch.zeros(1)
    with torch.no_grad():
        for number in range(3):
            for axes in combinations((2, 4), number):
                total = total + compute_logits(tensors, x.flip(axes)).flip(axes)
    expected = total[0].argmax(0).numpy().transpose(1, 0, 2)[2:-2]
    assert (found == expected).mean() > 0.999
    assert len(np.unique(found)) == 3


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # of nnU-Net's packages
@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_masks_equal_those_of_nnunets_predictor(kind: str, tmp_path: Path) -> None:
    """Several windows, at the voxel size of the plans. It runs where nnunetv2 is installed."""
    module = pytest.importorskip("nnunetv2.inference.predict_from_raw_data")
    root, scan = write_results(tmp_path, kind), write_scan(tmp_path / "scan_0000.nii.gz", 1.0)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    predictor = module.nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(root), (0,))
    predictor.predict_from_files_sequential(
        [[str(scan)]], [str(theirs / "scan")], save_probabilities=True
    )
    assert main(["nnunet", str(root), str(tmp_path / "run")]) == 0
    arguments = [str(tmp_path / "run"), str(scan), "--out", str(tmp_path / "ours")]
    assert main(["predict", *arguments, "--force", "--device", "cpu", "--threads", "1"]) == 0
    expected, found = read_mask(theirs / "scan.nii.gz"), read_mask(tmp_path / "ours/scan.nii.gz")
    probabilities = np.sort(np.load(theirs / "scan.npz")["probabilities"], axis=0)
    margin = (probabilities[-1] - probabilities[-2]).transpose(2, 1, 0)
    assert (found == expected).mean() > 0.995
    assert margin[found != expected].max(initial=0) < HALF_PRECISION_MARGIN


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore")
def test_masks_of_a_network_that_nnunet_trains(tmp_path: Path) -> None:
    """nnU-Net plans, trains a few iterations and predicts; scans are resampled."""
    pytest.importorskip("nnunetv2")
    phantoms = tmp_path / "phantoms"
    assert main(["phantom", str(phantoms), "--cases", "5", "--seed", "3", "--workers", "1"]) == 0
    raw = tmp_path / "raw" / "Dataset003_Liver"
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    for label in (phantoms / "labelsTr").glob("*.nii.gz"):
        (raw / "labelsTr" / label.name).symlink_to(label)
        image = f"{label.name.removesuffix('.nii.gz')}_0000.nii.gz"
        (raw / "imagesTr" / image).symlink_to(phantoms / "imagesTr" / label.name)
    described = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1, "tumour": 2},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(described))
    small = {"base_features": 4, "memory_gb": 0.1, "spacing_mm": [5.0, 5.5, 5.0]}
    run_nnunet(tmp_path, stage="prepare", **small)
    trained = run_nnunet(
        tmp_path, stage="train", iterations=75, seed=1, trainer="nnUNetTrainerAdam3en4",
        device="cpu",
    )  # fmt: skip
    scans = sorted((raw / "imagesTr").iterdir())[:2]
    run_nnunet(
        tmp_path, stage="predict", model=trained["model"], inputs=[str(scan) for scan in scans],
        out=str(tmp_path / "theirs"), device="cpu",
    )  # fmt: skip
    assert main(["nnunet", trained["model"], str(tmp_path / "run")]) == 0
    out = tmp_path / "ours"
    arguments = [str(tmp_path / "run"), *map(str, scans), "--out", str(out)]
    assert main(["predict", *arguments, "--device", "cpu", "--threads", "1"]) == 0
    for file in sorted(out.glob("*.nii.gz")):
        expected, found = read_mask(tmp_path / "theirs" / file.name), read_mask(file)
        assert (expected > 0).any()
        assert dice(expected > 0, found > 0) > 0.98


def run_nnunet(folder: Path, **job: Any) -> Any:
    """One stage of nnU-Net in a process of its own."""
    environment = {
        "nnUNet_raw": str(folder / "raw"),
        "nnUNet_preprocessed": str(folder / "preprocessed"),
        "nnUNet_results": str(folder / "results"),
        "nnUNet_n_proc_DA": "1",
        "nnUNet_compile": "f",
    }
    program = ROOT / "tools" / "bench" / "nnunet_job.py"
    assignments = [f"{name}={value}" for name, value in environment.items()]
    command = ["env", *assignments, sys.executable, str(program), json.dumps(job)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=3000)
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_settings_are_those_of_the_plans(tmp_path: Path) -> None:
    settings = build_run_settings(NnunetFolder.open(write_results(tmp_path)))
    assert settings.data.spacing_mm == (4.0, 6.0, 3.0)
    assert settings.data.patch_size == (16, 8, 24)
    # Axes 0 and 2 of the plans are y and x.
    assert settings.data.mirror_axes == ("y", "x")
    assert settings.data.label_scheme.structure_names == ("liver", "tumour")
    assert settings.convert.cleaning.order_z == 0


def test_regions_are_painted_in_nnunets_order(tmp_path: Path) -> None:
    dataset = {"labels": {"background": 0, "liver": [1, 2], "tumour": 2}}
    root = write_results(tmp_path, dataset=dataset | {"regions_class_order": [1, 2]})
    assert build_run_settings(NnunetFolder.open(root)).model.regions
    root = write_results(tmp_path, dataset=dataset | {"regions_class_order": [2, 2]})
    with pytest.raises(UserError, match=r"only \[1, 2\] is supported"):
        build_run_settings(NnunetFolder.open(root))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("normalization_schemes", ["ZScoreNormalization"], "channel CT has ZScoreNormalization"),
        ("normalization_schemes", [], "not one per channel"),
        ("resampling_fn_data", "resample_torch_fornnunet", "resampled by resample_torch"),
        ("spacing", [1.0], "spacing of 3d_fullres has no three values"),
    ],
)
def test_other_preprocessing_is_refused(
    key: str, value: object, message: str, tmp_path: Path
) -> None:
    plans = make_plans()
    plans["configurations"]["3d_fullres"][key] = value
    root = write_results(tmp_path, plans=plans)
    with pytest.raises(UserError, match=message):
        build_run_settings(NnunetFolder.open(root))


def list_places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each (container, key) of nested dictionaries and lists."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from list_places(value[key])


@pytest.mark.parametrize("damage", [None, -1], ids=repr)
def test_damaged_plans_end_in_one_line(damage: object, tmp_path: Path) -> None:
    """Each value of plans.json is replaced; the folder is refused with a reason or still usable."""
    root = write_results(tmp_path)
    count = len(list(list_places(make_plans())))
    messages = []
    for number in range(count):
        plans = make_plans()
        container, key = list(list_places(plans))[number]
        container[key] = damage
        (root / "plans.json").write_text(json.dumps(plans))
        try:
            build_run_settings(NnunetFolder.open(root))
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > count // 3
    assert "\n" not in "".join(messages)


def test_command_refuses_wrong_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_results(tmp_path)
    assert main(["nnunet", str(tmp_path), str(tmp_path / "run")]) == 2
    assert "no plans.json in it" in capsys.readouterr().err
    assert main(["nnunet", str(root), str(root)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["nnunet", str(root), str(tmp_path / "run"), "--dry-run"]) == 0
    assert not (tmp_path / "run").exists()
