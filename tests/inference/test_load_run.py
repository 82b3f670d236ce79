"""Runs are loaded exactly, and each kind of unusable run gives one clear error."""

import argparse
import resource
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from liverseg_dist.commands.main import main
from liverseg_dist.commands.run_cases import load_runs
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import UserError
from liverseg_dist.inference import build_predictor, load_run
from liverseg_dist.inference.load_run import find_common_mirror_axes, fingerprint_runs
from liverseg_dist.labels import LabelScheme, Structure
from tests.inference.small_run import SmallRun, train_small_run

CPU = torch.device("cpu")


@pytest.fixture
def run(small_run: SmallRun, tmp_path: Path) -> Path:
    """A copy that a test can change."""
    return Path(shutil.copytree(small_run.run, tmp_path / "run"))


def test_loads_weights_and_settings(small_run: SmallRun) -> None:
    loaded = load_run(small_run.run, CPU, ["inference.overlap=0.75"])
    weights = load_file(small_run.run / "model.safetensors")
    assert all(
        torch.equal(value, weights[name]) for name, value in loaded.model.state_dict().items()
    )
    assert not loaded.model.training
    assert loaded.settings.inference.overlap == 0.75
    assert loaded.settings.data.intensity is not None


def test_missing_files_are_named_with_a_remedy(run: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        load_run(run / "nowhere", CPU)
    with pytest.raises(UserError, match=r"best\.safetensors"):
        load_run(run, CPU, weights="best")
    (run / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors yet; train to the end"):
        load_run(run, CPU)
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match="no run folder"):
        load_run(run, CPU)


def test_damaged_weights_are_an_error(run: Path) -> None:
    content = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        load_run(run, CPU)
    (run / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(UserError, match="cannot be read"):
        load_run(run, CPU)
    save_file({"other": torch.zeros(3)}, run / "model.safetensors")
    with pytest.raises(UserError, match="do not fit the model"):
        load_run(run, CPU)


def test_settings_of_a_huge_network_take_no_memory(run: Path) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["model"]["features"] = [4096, 4096]  # 54 GB of weights
    content["model"]["blocks_per_level"] = [16, 16]
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="do not fit the model"):
        load_run(run, CPU)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_only_inference_settings_can_be_overridden(run: Path) -> None:
    with pytest.raises(UserError, match=r"takes inference\.\* only"):
        load_run(run, CPU, ["data.patch_size=[1,1,1]"])
    with pytest.raises(UserError, match=r"did you mean inference\.overlap"):
        load_run(run, CPU, ["inference.overlp=0.1"])
    (run / "config.yaml").write_text("model: {preset: tiny}\n")
    with pytest.raises(UserError, match="has no value"):
        load_run(run, CPU)


def test_runs_with_different_inputs_are_not_averaged(
    small_run: SmallRun, run: Path, tmp_path: Path
) -> None:
    train_small_run(tmp_path / "second", small_run.store, steps=1, seed=1)
    runs = [load_run(folder, CPU) for folder in (run, tmp_path / "second")]
    assert len(build_predictor(runs, CPU).models) == 2
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("lower_hu: ", "lower_hu: -1"))
    with pytest.raises(UserError, match=r"data\.intensity"):
        build_predictor([load_run(folder, CPU) for folder in (run, tmp_path / "second")], CPU)


@pytest.mark.parametrize(
    ("data", "axes"),
    [
        ({"augmentation": "none"}, ()),
        ({"augmentation": "nnunet"}, (0, 1, 2)),
        ({"augmentation": "nnunet", "mirror_axes": ["y", "z"]}, (0, 1)),
        ({"augmentation": "none", "mirror_axes": ["x"]}, (2,)),
    ],
)
def test_only_axes_of_the_training_are_mirrored(
    data: dict, axes: tuple[int, ...], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"] |= data
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    args = argparse.Namespace(run=run, ensemble=[], weights="last")
    runs = load_runs(args, World.from_environment("cpu", {}), ["inference.mirror=true"])
    flips = build_predictor(runs, CPU).flips  # of B C D H W
    assert len(flips) == 2 ** len(axes)
    assert {axis - 2 for flip in flips for axis in flip} == set(axes)
    assert find_common_mirror_axes(runs) == axes
    axes_in_fingerprint = fingerprint_runs(runs).get("mirrored_axes", (0, 1, 2))
    assert axes_in_fingerprint == axes, "other axes give other masks"
    assert ("inference.mirror=true changes nothing" in capsys.readouterr().err) == (not axes)


def test_an_ensemble_mirrors_the_common_axes_of_its_runs(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    for path, axes in ((run, ["z", "y"]), (other, ["y", "x"])):
        settings = yaml.safe_load((path / "config.yaml").read_text())
        settings["data"] |= {"augmentation": "light", "mirror_axes": axes}
        (path / "config.yaml").write_text(yaml.safe_dump(settings))
    args = argparse.Namespace(run=run, ensemble=[other], weights="last")
    runs = load_runs(args, World.from_environment("cpu", {}), ["inference.mirror=true"])
    assert build_predictor(runs, CPU).flips == ((), (3,))
    assert (
        "warning: not mirrored along z, x: some of these models were trained without"
        in capsys.readouterr().err
    )


def test_a_run_of_other_labels_or_channels_is_refused_with_both_sides(
    run: Path, small_run: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    kidneys = LabelScheme(
        ((0, "background"), (1, "kidney"), (2, "mass")),
        (Structure("kidney", (1, 2)), Structure("mass", (2,), "lesion", "kidney")),
    )
    mr = {"name": "T2", "modality": "MR", "intensity": "zscore"}
    changes: list[tuple[dict[str, object], tuple[str, str]]] = [
        ({"labels": kidneys.to_json()}, ("liver (1, 2), tumour (2)", "kidney (1, 2), mass (2)")),
        ({"channels": [mr]}, ("the channels CT", "trained on T2 (MR)")),
    ]
    for change, sides in changes:
        other = {**settings, "data": settings["data"] | change}
        (run / "config.yaml").write_text(yaml.safe_dump(other))
        for command in ("evaluate", "postprocess"):
            line = [command, str(run), "--store", str(small_run.store), "--device", "cpu"]
            assert main(line) == 2
            error = capsys.readouterr().err
            assert all(side in error for side in sides), error
            assert error.count("\n") == 1
