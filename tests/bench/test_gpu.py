"""`tools/bench/gpu` on a CPU: every section runs, on tiny sizes, and reports each case.

The figures mean nothing here. The test keeps the script usable until a GPU is at hand.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "bench" / "gpu"
# All sections run in one fixture: 30 s on an idle machine, minutes on a busy one.
pytestmark = pytest.mark.timeout(1200)
SECTIONS = {
    "ceilings": "forward_backward_tflop_per_s",
    "steps": "predicted_gib",
    "training": "data_wait_share",
    "nnunet": None,
    "augmentation": "scalar_reads_per_sample",
    "inference": "ms_per_window",
    "correctness": "gradients_relative_difference",
    "checkpoint": "stall_ms",
    "dice": "liver_dice",
}
"""A figure of each section; None: the section measures a peer only, which may be absent."""
REASONS = ("not installed: ", "needs a GPU")


def run_script(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """The lines of all sections, and what the script printed."""
    out = tmp_path_factory.mktemp("bench") / "gpu.jsonl"
    done = run_script("--cpu", "--out", out)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(text) for text in out.read_text().splitlines()], done.stdout


def test_every_case_has_figures_or_a_reason(
    results: tuple[list[dict[str, Any]], str],
) -> None:
    lines, _ = results
    for line in lines:
        if "case" in line and line["status"] != "measured":
            assert line["status"] in ("absent", "skipped"), line
            assert line["reason"].startswith(REASONS), line


def test_every_section_is_measured(results: tuple[list[dict[str, Any]], str]) -> None:
    lines, table = results
    for section, figure in SECTIONS.items():
        own = [line for line in lines if line["section"] == section]
        assert own[-1]["status"] == "done"
        assert len(own) > 1
        assert f"### {section}: " in table
        if figure is not None:
            assert any(figure in line for line in own), section
            assert figure in table


def test_results_that_must_hold_on_any_device(
    results: tuple[list[dict[str, Any]], str],
) -> None:
    lines, _ = results
    hashes = next(line for line in lines if "resumed_run_has_equal_bytes" in line)
    assert hashes["equal_runs_have_equal_bytes"]
    assert hashes["resumed_run_has_equal_bytes"]
    exact = [line for line in lines if line.get("system", "").startswith("fp32, N")]
    differences = [line["gradients_relative_difference"] for line in exact]
    assert len(differences) == 2
    assert max(differences) < 1e-5


def test_sections_of_the_test_are_those_of_the_script() -> None:
    done = run_script("--list")
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(SECTIONS)


def test_a_mistake_in_the_call_is_one_line(tmp_path: Path) -> None:
    done = run_script("--cpu")
    assert done.returncode == 2
    assert "--out FILE is needed" in done.stderr
    done = run_script("--table", tmp_path / "missing.jsonl")
    assert done.returncode == 2
    assert "no such file" in done.stderr
    assert "Traceback" not in done.stderr
