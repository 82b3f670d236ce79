"""A user's mistakes at the command line: one clear line, the right exit code, no traceback, nothing half-written."""

import gzip
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from liverseg_dist.commands.main import COMMANDS, main
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.errors import EXIT_FAILED, EXIT_USER
from tests.conftest import SMALL_STORE
from tests.distributed.launch import liverseg

TINY_RUN = (
    "data.patch_size=[16,32,32]", "data.workers=1", "model.features=[4,8]", "train.threads=1", "train.max_steps=1",
    "validation.every_steps=0",
)  # fmt: skip
STORE = ("convert.cleaning.spacing_mm=[6,6,6]", "convert.splits.folds=2", "convert.workers=1")


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert "exit codes:" in text
    assert f"liverseg {command}" in text
    assert "--json" in text


def test_an_unknown_command_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tarin"])
    assert ended.value.code == EXIT_USER
    assert "'train'" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["absent", "empty", "file"])
def test_a_wrong_source_folder(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    if what == "empty":
        source.mkdir()
    elif what == "file":
        source.write_text("x")
    code, _, err = call(capsys, "convert", source, tmp_path / "store")
    assert code == EXIT_USER
    assert str(source) in err
    assert "imagesTr" in err
    assert not (tmp_path / "store").exists()


@pytest.fixture
def source(phantom_source: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(phantom_source, tmp_path / "source"))


def test_labels_that_the_index_does_not_name(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((source / "dataset.json").read_text())
    index["labels"] = {"0": "background", "1": "spleen"}
    (source / "dataset.json").write_text(json.dumps(index))
    _, out, _ = call(capsys, "convert", source, tmp_path / "store", "--json", *STORE)
    audit = json.loads(out.splitlines()[-1])["audit"]
    excluded = [case for case, entry in audit.items() if entry["status"] == "excluded"]
    assert excluded
    for case in excluded:
        messages = " ".join(finding["message"] for finding in audit[case]["findings"])
        assert f"labelsTr/{case}.nii.gz: label values 2" in messages
        assert "expected 0 background, 1 spleen" in messages


def test_broken_and_missing_files_are_told_and_the_rest_goes_on(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = source / "imagesTr" / "liver_0.nii.gz"
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    (source / "imagesTr" / "liver_1.nii.gz").write_bytes(gzip.compress(b"no scan at all"))
    (source / "labelsTr" / "liver_2.nii.gz").unlink()
    (source / "imagesTr" / "liver_3.nii.gz").unlink()
    code, out, err = call(capsys, "convert", source, tmp_path / "store", "--json", *STORE)
    assert code == EXIT_FAILED
    result = json.loads(out.splitlines()[-1])
    status = {case: entry["status"] for case, entry in result["audit"].items()}
    assert status["liver_0"] == status["liver_1"] == status["liver_3"] == "quarantined"
    assert status["liver_2"] == "excluded"
    assert "liver_0" in err
    assert CaseStore.open(tmp_path / "store").case_ids == ("liver_4", "liver_5")


def test_a_store_of_other_settings_is_not_overwritten(
    phantom_source: Path, phantom_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (phantom_store / "zarr.json").read_bytes()
    code, _, err = call(
        capsys, "convert", phantom_source, phantom_store, "convert.cleaning.spacing_mm=[5,5,5]"
    )
    assert code == EXIT_USER
    assert "--force" in err
    assert (phantom_store / "zarr.json").read_bytes() == before


def test_a_folder_that_is_no_store_is_left_alone(
    phantom_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    code, _, err = call(capsys, "convert", phantom_source, tmp_path)
    assert code == EXIT_USER
    assert "nothing is overwritten" in err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_no_place_to_write(phantom_source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "convert", phantom_source, "/proc/store.zarr", *STORE)
    assert code == EXIT_FAILED
    assert "/proc/store.zarr" in err


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk(phantom_source: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        done = liverseg("convert", phantom_source, disk / "store", "convert.workers=1")
        assert done.returncode == EXIT_FAILED
        assert "No space left" in done.stderr
        assert "free some space" in done.stderr
        assert "Traceback" not in done.stderr
        opened = liverseg("train", f"data.store={disk / 'store'}", f"run.dir={tmp_path / 'run'}")
        assert opened.returncode == EXIT_USER
        assert "its conversion has not finished" in opened.stderr
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        again = liverseg("convert", phantom_source, disk / "store", "convert.workers=1")
        assert again.returncode == 0, again.stderr
        assert liverseg("verify", disk / "store").returncode == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run.dir=r"], "data.store is not set"),
        (["data.store=absent.zarr"], "run.dir is not set"),
        (["data.store=absent.zarr", "run.dir=r"], "no Zarr store found"),
        (["run.dir=r", "train.learning_rat=1"], "did you mean train.learning_rate?"),
        (
            ["run.dir=r", "--config", "absent.yaml"],
            "no such config file; shipped with the program: configs/",
        ),
    ],
)
def test_train_says_what_it_lacks(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "train", *arguments)
    assert code == EXIT_USER
    assert said in err
    assert not Path("r").exists()


def test_train_refuses_what_cannot_be_trained(
    phantom_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [
        "train",
        "--device",
        "cpu",
        f"data.store={phantom_store}",
        f"run.dir={tmp_path / 'run'}",
    ]
    for override, said in [
        ("data.fold=9", "no fold 9; it has folds 0 to 1"),
        ("data.patch_size=[30,64,64]", "use for example"),
        ("model.pretrained=absent.safetensors", "no such file"),
        ("data.spacing_mm=[1,1,1]", ", not (1.0, 1.0, 1.0): the store decides it"),
        (
            "data.intensity={lower_hu: 0, upper_hu: 1, mean: 0, std: 1}",
            "data.intensity is lower_hu=",
        ),
        (
            "convert.cleaning={noise: median}",
            "convert.cleaning.noise is none, not median: the store decides it",
        ),
        ("train.fine_tune.freeze=encoder", "without model.pretrained"),
        (
            "train.activation_checkpointing=[17]",
            "train.activation_checkpointing: level 17 does not exist",
        ),
    ]:
        code, _, err = call(capsys, *base, override)
        assert code == EXIT_USER
        assert said in err
    assert not (tmp_path / "run").exists()


def test_train_keeps_out_of_what_is_no_run(
    phantom_store: Path, phantom_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(phantom_source.iterdir())
    for folder, holds in ((phantom_source, "dataset.json"), (phantom_store, "zarr.json")):
        words = [
            "train",
            "--device",
            "cpu",
            f"data.store={phantom_store}",
            f"run.dir={folder}",
            *TINY_RUN,
        ]
        code, _, err = call(capsys, *words)
        assert (code, err.strip()) == (
            EXIT_USER,
            f"liverseg: {folder}: contains {holds} and cannot be used as a run folder; choose another run.dir",
        )
    assert sorted(phantom_source.iterdir()) == before
    assert not (phantom_store / "config.yaml").exists()


def test_a_dry_run_of_train_says_what_the_run_would_say(
    phantom_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [
        "train",
        "--device",
        "cpu",
        f"data.store={phantom_store}",
        f"run.dir={tmp_path / 'run'}",
        *TINY_RUN,
    ]
    assert call(capsys, *base)[0] == 0
    code, _, err = call(capsys, *base, "--dry-run", "train.learning_rate=0.7")
    assert code == EXIT_USER
    assert "train.learning_rate=0.01" in err
    _, _, err = call(
        capsys, *base, "data.patch_size=[128,32,32]", f"run.dir={tmp_path / 'other'}", "--dry-run"
    )
    assert "data.patch_size is 128 slices high, slabs have 64: the rest is padding" in err


def test_the_score_to_publish_is_not_replaced(
    phantom_store: Path, phantom_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["--device", "cpu", f"data.store={phantom_store}", f"run.dir={run}", *TINY_RUN]
    assert call(capsys, "train", *words)[0] == 0
    evaluate = ["evaluate", run, "--device", "cpu", "--threads", "1"]
    code, out, _ = call(capsys, *evaluate, "--source", phantom_source)
    assert (code, "with the help of the truth" in out) == (0, False)
    code, _, err = call(capsys, *evaluate)
    assert (code, "contains the scores of whole scans; give --source again" in err) == (
        EXIT_USER,
        True,
    )
    code, out, _ = call(capsys, *evaluate, "--out", tmp_path / "slabs")
    assert (code, "with the help of the truth" in out) == (0, True)


def test_split_settings_without_effect_are_told(
    phantom_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", phantom_source, tmp_path / "s", "--dry-run", "convert.splits.kind=nnunet"]
    _, _, err = call(capsys, *words, "convert.splits.folds=3", "convert.workers=1")
    assert "warning: convert.splits.folds change nothing with convert.splits.kind=nnunet" in err


def test_train_tells_what_a_file_says_otherwise_than_the_store(
    phantom_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As another run's config.yaml does, from which weights are taken."""
    base = [
        "train",
        "--dry-run",
        "--device",
        "cpu",
        f"data.store={phantom_store}",
        f"run.dir={tmp_path / 'run'}",
    ]
    base += ["data.patch_size=[32,32,32]", "--config", str(tmp_path / "other.yaml")]
    (tmp_path / "other.yaml").write_text(
        "data: {spacing_mm: [5, 5, 5]}\nconvert: {cleaning: {noise: median}}"
    )
    mm = CaseStore.open(phantom_store).spacing_mm
    code, _, err = call(capsys, *base)
    assert code == 0
    assert err.strip() == (
        f"warning: {phantom_store} decides: convert.cleaning.noise is none, not median; "
        f"data.spacing_mm is {mm}, not (5.0, 5.0, 5.0); for these convert with --config"
    )
    (tmp_path / "other.yaml").write_text(f"data: {{spacing_mm: {list(mm)}}}")
    code, _, err = call(capsys, *base, *SMALL_STORE)
    assert (code, err) == (0, "")


def test_a_store_of_the_future_is_refused(
    phantom_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(shutil.copytree(phantom_store, tmp_path / "store"))
    root = json.loads((store / "zarr.json").read_text())
    root["attributes"]["liverseg"]["schema"] = 99
    (store / "zarr.json").write_text(json.dumps(root))
    code, _, err = call(
        capsys, "train", "--dry-run", f"data.store={store}", f"run.dir={tmp_path / 'run'}"
    )
    assert code == EXIT_USER
    assert "schema 99, this version reads 1 and 2" in err


def test_the_dry_run_writes_nothing(
    phantom_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(
        capsys, "convert", phantom_source, tmp_path / "store", "--dry-run", "convert.workers=1"
    )
    assert code == 0
    assert "nothing was written" in out
    assert not (tmp_path / "store").exists()
