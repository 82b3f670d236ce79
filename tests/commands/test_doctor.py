"""`liverseg doctor`: the facts that it reports, problems and warnings."""

import importlib.metadata
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from liverseg_dist.commands.main import main
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED

Usage = namedtuple("Usage", "total used free")


def run_doctor(capsys: pytest.CaptureFixture[str], folder: Path) -> tuple[int, dict, str]:
    code = main(["doctor", "--folder", str(folder), "--json"])
    output = capsys.readouterr().out
    return code, json.loads(output.splitlines()[-1]), output


def test_it_reports_what_training_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, facts, output = run_doctor(capsys, tmp_path)
    assert code == (EXIT_FAILED if facts["problems"] else EXIT_DONE)
    for name in ("torch", "cuda", "gpus", "nccl", "gloo", "deepspeed", "deepspeed_ops", "ray", "ray_dashboard", "slurm",
                 "shm_gib", "write_mib_s", "small_file_ms", "open_files", "memory_gib", "address",
                 "rendezvous", "locks"):  # fmt: skip
        assert name in facts
        assert name in output
    assert facts["write_mib_s"] > 0
    assert facts["rendezvous"], "this installation registers it"
    assert set(facts["deepspeed_ops"]) == {"fused_adam", "cpu_adam"}
    assert list(tmp_path.iterdir()) == [], "the probe removes its files"


def test_a_folder_that_cannot_be_written_is_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    code, facts, output = run_doctor(capsys, tmp_path / "file")
    assert code == EXIT_FAILED
    assert f"problem: {tmp_path / 'file'}: runs cannot be written here" in output
    assert "write_mib_s" not in facts


def test_little_free_space_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 30, 1 << 30, 64 << 20))
    _, facts, _ = run_doctor(capsys, tmp_path)
    assert any(
        "/dev/shm has 0.1 GiB free" in text and "--shm-size" in text for text in facts["warnings"]
    )
    assert any("is little for a store or a run" in text for text in facts["warnings"])


def test_a_missing_rendezvous_is_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: importlib.metadata.EntryPoints()
    )
    code, facts, _ = run_doctor(capsys, tmp_path)
    assert code == EXIT_FAILED
    assert any(
        "torchrun does not find --rdzv-backend=liverseg: run tools/setup" in text
        for text in facts["problems"]
    )


def test_a_silent_slurm_controller_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, body in (("sbatch", "exit 0"), ("sinfo", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert any(
        "no controller answers" in text for text in run_doctor(capsys, tmp_path)[1]["warnings"]
    )
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho 'gpu* 4 up'\n")
    assert run_doctor(capsys, tmp_path)[1]["partitions"] == ["gpu* 4 up"]
