"""Scores and choices of earlier weights are found by the checksums that they record."""

import hashlib
import json
from pathlib import Path

import pytest

from liverseg_dist.inference.load_run import POSTPROCESS, WEIGHTS_COMMENT
from liverseg_dist.inference.outdated_results import find_outdated_results

EARLIER = "0" * 64


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"the weights of now")
    return tmp_path


def hash_now(run: Path) -> str:
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


def write_summary(folder: Path, *checksums: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"details": {"weights_sha256": list(checksums)}}
    (folder / "summary.json").write_text(json.dumps(content))


def test_results_of_the_present_weights_are_no_finding(run: Path) -> None:
    write_summary(run / "evaluation", hash_now(run))
    # An ensemble: one of its members is this run.
    write_summary(run / "evaluation" / "ensemble", EARLIER, hash_now(run))
    (run / POSTPROCESS).write_text(f"{WEIGHTS_COMMENT}{hash_now(run)}\n")
    assert find_outdated_results(run) == []


def test_each_result_of_earlier_weights_is_named(run: Path) -> None:
    write_summary(run / "evaluation", EARLIER)
    write_summary(run / "evaluation" / "validation", EARLIER)
    (run / POSTPROCESS).write_text(f"inference: {{}}\n{WEIGHTS_COMMENT}{EARLIER}\n")
    first, second, choice = find_outdated_results(run)
    assert first.startswith(f"{run / 'evaluation'} holds scores of earlier weights")
    assert second.startswith(f"{run / 'evaluation' / 'validation'} holds")
    assert str(run / POSTPROCESS) in choice
    assert "run `liverseg postprocess` again" in choice


@pytest.mark.parametrize("content", ["", "[]", "{", '{"details": null}', "[" * 100_000])
def test_a_damaged_summary_is_no_evidence(run: Path, content: str) -> None:
    (run / "evaluation").mkdir()
    (run / "evaluation" / "summary.json").write_text(content)
    assert find_outdated_results(run) == []


def test_without_weights_nothing_is_outdated(tmp_path: Path) -> None:
    write_summary(tmp_path / "evaluation", EARLIER)
    assert find_outdated_results(tmp_path) == []
