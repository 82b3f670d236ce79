"""Unexpected errors of commands that divide cases among ranks: one line on the terminal, the traceback in a file."""

from pathlib import Path

import pytest

from liverseg_dist.commands.main import main
from liverseg_dist.inference import evaluate_cases as evaluating
from tests.distributed.launch import torchrun
from tests.inference.small_run import SmallRun, shared_small_run
from tests.test_files import little_room


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return shared_small_run(tmp_path_factory)


def read_crash_reports(folder: Path) -> list[str]:
    return [file.read_text() for file in sorted((folder / "errors").glob("*.txt"))]


def test_a_case_with_an_unexpected_error_gets_a_crash_report(
    small_run: SmallRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def raise_key_error(case_id: str, *_: object, **__: object) -> None:
        raise KeyError(f"what {case_id} lacks")

    monkeypatch.setattr(evaluating, "score_case", raise_key_error)
    out = tmp_path / "out"
    assert (
        main(["evaluate", str(small_run.run), "--store", str(small_run.store), "--out", str(out)])
        == 1
    )
    errors = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("liverseg: ")
    ]
    assert not any("Traceback" in line for line in errors)
    report = read_crash_reports(out)[0]
    assert "KeyError" in report
    assert "in raise_key_error" in report, "the stack of the failure"


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_full_disk_is_reported_with_the_file(
    command: str, small_run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    scan = next((small_run.source / "imagesTr").glob("*.nii.gz"))
    words = {
        "evaluate": ["--store", str(small_run.store)],
        "predict": [str(scan)],
    }[command]
    with little_room(20):
        assert main([command, str(small_run.run), *words, "--out", str(out)]) == 1
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("liverseg: ")
    ]
    assert "/ledger/" in line or "cases.jsonl" in line, line
    assert "File too large" in line


@pytest.mark.distributed
def test_the_summary_of_torchrun_contains_the_reason(tmp_path: Path) -> None:
    done = torchrun(
        2, "-m", "liverseg_dist", "train", "data.store=nowhere", f"run.dir={tmp_path / 'run'}"
    )
    assert done.returncode != 0
    assert "  traceback : nowhere: no Zarr store found" in done.stderr.splitlines()[-2]
