"""How commands that share out cases tell of what they did not foresee: a line on the terminal, the story in a file."""

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


def stories(folder: Path) -> list[str]:
    return [file.read_text() for file in sorted((folder / "errors").glob("*.txt"))]


def test_a_case_that_fails_for_an_unknown_reason_leaves_its_story(
    small_run: SmallRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def surprise(case_id: str, *_: object) -> None:
        raise KeyError(f"what {case_id} lacks")

    monkeypatch.setattr(evaluating, "score_case", surprise)
    out = tmp_path / "out"
    assert (
        main(["evaluate", str(small_run.run), "--store", str(small_run.store), "--out", str(out)])
        == 1
    )
    errors = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("liverseg: ")
    ]
    assert not any("Traceback" in line for line in errors)
    story = stories(out)[0]
    assert "KeyError" in story
    assert "in surprise" in story, "the stack of the failure itself"


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_full_disk_is_told_with_the_file_and_the_remedy(
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
def test_torchruns_own_last_words_have_the_reason(tmp_path: Path) -> None:
    done = torchrun(
        2, "-m", "liverseg_dist", "train", "data.store=nowhere", f"run.dir={tmp_path / 'run'}"
    )
    assert done.returncode != 0
    assert "  traceback : nowhere: no Zarr store found" in done.stderr.splitlines()[-2]
