"""`liverseg plan SRC` on raw data sets, and the commands that read its file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from liverseg_dist.commands.main import main
from liverseg_dist.config import load_settings
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER
from tests.planning.fingerprints import write_dataset


def plan(
    capsys: pytest.CaptureFixture[str], source: Path, *arguments: str
) -> tuple[int, dict[str, Any], str]:
    """Run `plan` on a data set; return exit code, JSON result and the text before it."""
    capsys.readouterr()
    code = main(["plan", str(source), *arguments, "--workers", "1", "--json"])
    *text, last = capsys.readouterr().out.splitlines()
    return code, json.loads(last), "\n".join(text)


def test_file_is_accepted_by_convert_and_train(
    phantom_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.yaml"
    code, found, text = plan(capsys, phantom_source, "--out", str(out), "--gpu-memory-gib", "8")
    assert code == EXIT_DONE
    assert found["need_gib"] <= 8
    written = load_settings([out])
    decisions = {entry["key"]: entry["value"] for entry in found["decisions"]}
    assert list(written.data.patch_size) == decisions["data.patch_size"]
    for entry in found["decisions"]:
        assert entry["reason"] in text
        assert f"# {entry['reason']}" in out.read_text()
    assert f"liverseg convert {phantom_source}" in text
    store = tmp_path / "store.zarr"
    assert main(["convert", str(phantom_source), str(store), "--config", str(out)]) == EXIT_DONE
    line = ["train", "--config", str(out), f"data.store={store}", f"run.dir={tmp_path / 'run'}"]
    assert main([*line, "--dry-run"]) == EXIT_DONE


def test_measurements_are_kept_beside_the_file_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_dataset(tmp_path / "data"), tmp_path / "plan.yaml"
    assert plan(capsys, source)[0] == EXIT_DONE
    assert not list(tmp_path.rglob("*fingerprint*"))
    first = plan(capsys, source, "--out", str(out))[1]
    assert (tmp_path / "plan.fingerprint.json").is_file()
    again = plan(capsys, source, "--out", str(out))[1]
    assert again == first
    plan(capsys, source, "--fingerprint", str(tmp_path / "own.json"))
    assert (tmp_path / "own.json").is_file()


def test_cpu_plan_and_given_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_dataset(tmp_path / "data"), tmp_path / "plan.yaml"
    _, found, _ = plan(
        capsys, source, "--out", str(out), "--cpu-minutes", "5", "train.learning_rate=0.001"
    )
    written = load_settings([out])
    assert written.model.preset == "tiny"
    assert written.train.learning_rate == 0.001
    assert found["cpu_minutes"] == 5
    reasons = {entry["key"]: entry["reason"] for entry in found["decisions"]}
    assert reasons["train.learning_rate"] == "given by the user"


def test_devices_and_memory_have_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_dataset(tmp_path / "data")
    found = plan(capsys, source, "--devices", "4")[1]
    assert found["devices"] == 4
    batch = next(d for d in found["decisions"] if d["key"] == "train.global_batch_size")
    assert batch["value"] % 4 == 0
    assert found["gpu_memory_gib"] > 0


def test_left_out_scans_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_dataset(tmp_path / "data", cases=3)
    (source / "imagesTr" / "case_1_0000.nii.gz").write_bytes(b"damaged")
    code, found, _ = plan(capsys, source)
    assert code == EXIT_DONE
    assert found["fingerprint"]["cases"] == 2
    assert found["fingerprint"]["left_out"][0]["case"] == "case_1"
    (source / "imagesTr" / "case_2_0000.nii.gz").write_bytes(b"damaged")
    code, found, _ = plan(capsys, source)
    assert code == EXIT_FAILED
    assert "2 of 3 labelled scans cannot be read" in found["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-memory-gib", "0.3"], "--gpu-memory-gib 0.3: one sample of"),
        (["--gpu-memory-gib", "-1"], "must be above 0"),
        (["--cpu-minutes", "0"], "--cpu-minutes 0: must be above 0"),
        (["--workers", "-1"], "--workers -1: must be 0"),
        (["--scale"], "--scale: needs a store"),
        (["data.patch_size=[15,33,33]"], "each edge must be a multiple"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_dataset(tmp_path / "data", cases=1)
    assert main(["plan", str(source), *arguments]) == EXIT_USER
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("liverseg: ")
    assert message in error


def test_options_of_data_sets_are_refused_for_stores(
    phantom_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(phantom_store), "--cpu-minutes", "5"]) == EXIT_USER
    assert "--cpu-minutes: only for a folder of scans" in capsys.readouterr().err


def test_workers_of_a_real_process(tmp_path: Path) -> None:
    source = write_dataset(tmp_path / "data", cases=3)
    line = [sys.executable, "-m", "liverseg_dist", "plan", str(source), "--workers", "2", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "fingerprint: 3/3" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["fingerprint"]["cases"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "5"], "--minutes: only with --data"),
        (["--data", "{data}", "--minutes", "0"], "--minutes 0: must be above 0"),
        (["--data", "{data}", "--config", "configs/demo_cpu.yaml", "--minutes", "5"], "without"),
    ],
)
def test_demo_refuses_minutes_without_a_plan(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [text.format(data=tmp_path) for text in arguments]
    assert main(["demo", "--out", str(tmp_path / "out"), *filled]) == EXIT_USER
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_demo_plans_the_data_it_is_given(phantom_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = [sys.executable, "-m", "liverseg_dist", "demo", "--data", str(phantom_source)]
    line += ["--out", str(out), "--minutes", "0.3", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == EXIT_DONE, done.stderr
    assert (out / "plan.yaml").is_file()
    summary = json.loads(done.stdout.splitlines()[-1])["summary"]
    assert summary["n_cases"] > 0
