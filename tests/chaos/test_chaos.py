"""A short campaign: faults that no other test does. `tools/chaos` runs the long one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.stages import ROOT
from tests.cluster.slurm import find_missing_requirement
from tests.distributed.launch import clean_environment


@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.geteuid() != 0, reason="filling a disk and cutting a network needs root")
def test_faults_are_survived(tmp_path: Path) -> None:
    if reason := find_missing_requirement():
        pytest.skip(reason)
    command = [sys.executable, "-m", "tests.chaos.run", "--short", "--out", str(tmp_path)]
    ended = subprocess.run(
        command, env=clean_environment(), cwd=ROOT, text=True, capture_output=True
    )
    reports = [json.loads(line) for line in (tmp_path / "chaos.jsonl").read_text().splitlines()]
    assert [report for report in reports if not report["survived"]] == []
    assert ended.returncode == 0, ended.stderr[-3000:]
    said = {report["kind"]: report["said"] for report in reports}
    assert set(said) == {"disk full", "network cut in mid-step"}
    assert "No space left on device" in said["disk full"]
