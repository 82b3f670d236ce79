"""A short campaign: faults that no other test does. `tools/chaos` runs the long one."""

import os
from pathlib import Path

import pytest

from tests.chaos.faults import FAULTS
from tests.chaos.run import campaign
from tests.cluster.slurm import why_not

FEW = (
    ("disk full", "train"),
    ("network cut in mid-step", "train"),
    ("disk read-only", "convert"),
)


@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.geteuid() != 0, reason="filling a disk and cutting a network needs root")
def test_faults_are_survived(phantom_source: Path, tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    kinds = {fault.kind: fault for fault in FAULTS}
    reports = campaign(tmp_path, [(kinds[kind], stage) for kind, stage in FEW], 0, phantom_source)
    assert [report for report in reports if not report.survived] == []
    assert "No space left on device" in reports[0].said
