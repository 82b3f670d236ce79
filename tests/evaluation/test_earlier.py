"""Evaluations of other weights or settings do not replace each other."""

import json
import shutil
from pathlib import Path

import pytest

from liverseg_dist.commands.main import main
from liverseg_dist.evaluation.earlier import move_earlier_results
from liverseg_dist.evaluation.results import load_results, rewrite_results
from tests.inference.small_run import SmallRun, shared_small_run

POSTPROCESS = "inference:\n  largest_component: true\n  min_tumour_ml: 0.3\n"


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A run that a test may change."""
    small = shared_small_run(tmp_path_factory)
    shutil.copytree(small.run, tmp_path / "run")
    return SmallRun(small.source, small.store, tmp_path / "run")


def evaluate(run: SmallRun, *more: str) -> dict[str, object]:
    arguments = [
        "evaluate",
        str(run.run),
        "--store",
        str(run.store),
        "--device",
        "cpu",
        "--threads",
        "1",
        *more,
    ]
    assert main(arguments) == 0
    return json.loads((run.run / "evaluation" / "summary.json").read_text())


def test_results_before_and_after_postprocessing(
    run: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    before = evaluate(run)
    written = {path.name for path in (run.run / "evaluation").iterdir()}
    assert before["postprocessing"] is None
    assert "post-processing: none\n" in capsys.readouterr().out
    (run.run / "postprocess.yaml").write_text(POSTPROCESS)
    after = evaluate(run)
    printed = capsys.readouterr().out
    assert after["postprocessing"] == {"largest_component": True, "min_tumour_ml": 0.3}
    assert (
        "post-processing: largest_component=true, min_tumour_ml=0.3 "
        "(postprocess.yaml of the run, chosen by liverseg postprocess)\n" in printed
    )
    (earlier,) = (run.run / "evaluation" / "earlier").iterdir()
    assert (
        f"earlier results of other weights or settings are kept in {earlier} (liver Dice "
        in printed
    )
    assert json.loads((earlier / "summary.json").read_text()) == before
    assert {"cases.csv", "lesions.csv", "report.html", "ledger", "training.json"} <= written
    assert {path.name for path in earlier.iterdir()} == written
    assert main(["compare", str(earlier), str(run.run / "evaluation")]) == 0
    assert rewrite_results(load_results(earlier))["postprocessing"] is None
    assert rewrite_results(load_results(run.run))["postprocessing"] == after["postprocessing"]


def test_switching_settings_keeps_one_copy_of_each(run: SmallRun) -> None:
    first = evaluate(run)
    second = evaluate(run, "inference.min_tumour_ml=0.3")
    assert evaluate(run) == first
    assert evaluate(run, "inference.min_tumour_ml=0.3") == second
    folders = sorted((run.run / "evaluation" / "earlier").iterdir())
    assert len(folders) == 2
    kept = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    assert first in kept
    assert second in kept


def test_the_same_settings_move_nothing(run: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    first = evaluate(run)
    assert evaluate(run, "inference.batch_size=1") == first
    assert not (run.run / "evaluation" / "earlier").exists()
    assert "earlier results" not in capsys.readouterr().out


def test_an_interrupted_move_is_completed(tmp_path: Path) -> None:
    summary = {"ledger": {"fingerprint": "../ab/cd" + "0" * 60}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "cases.csv").write_text("new")
    # A report loads its large cases from this folder.
    (tmp_path / "slices").mkdir()
    target = tmp_path / "earlier" / "abcd0000"
    target.mkdir(parents=True)
    (target / "report.html").write_text("moved before")
    assert move_earlier_results(tmp_path, "other") == target
    assert sorted(path.name for path in target.iterdir()) == [
        "cases.csv",
        "report.html",
        "slices",
        "summary.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier"]
    assert move_earlier_results(tmp_path, "other") is None
