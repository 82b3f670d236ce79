"""Windows divided among real processes: each computed once, in order on rank 0; a failure ends its case, no more."""

import json
from pathlib import Path

import pytest

from tests.distributed.launch import torchrun

JOB = str(Path(__file__).with_name("team_job.py"))

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("broken_rank", [0, 2])
def test_all_windows_are_computed_and_a_failed_case_does_not_end_the_job(broken_rank: int) -> None:
    done = torchrun(3, JOB, str(broken_rank), timeout_s=120)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert first["answers"] == [200.0 + item for item in range(7)]
    for rank, (outcomes, computed) in enumerate(second["shares"]):
        assert outcomes == ["done", "own" if rank == broken_rank else "peer", "done"]
        share = list(range(rank, 7, 3))
        assert computed[: len(share)] == computed[-len(share) :] == share
