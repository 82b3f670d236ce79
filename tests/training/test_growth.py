"""What grows with the number of ranks: opened shards, checkpoint plans, file descriptors. Real processes."""

import json
import resource
from pathlib import Path

import pytest

from liverseg_dist.distributed.descriptors import raise_descriptor_limit
from liverseg_dist.errors import UserError
from tests.distributed.launch import torchrun

JOB = str(Path(__file__).with_name("counting_job.py"))


def count_calls(ranks: int, folder: Path) -> list[dict[str, int]]:
    done = torchrun(ranks, JOB, str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("counts ")]
    return sorted((json.loads(line[7:]) for line in lines), key=lambda one: one["rank"])


@pytest.mark.distributed
@pytest.mark.parametrize(
    "ranks",
    [
        2,
        pytest.param(4, marks=pytest.mark.long),
        pytest.param(8, marks=pytest.mark.long),
        pytest.param(16, marks=pytest.mark.long),
    ],
)
def test_calls_of_a_checkpoint_grow_linearly(ranks: int, tmp_path: Path) -> None:
    found = count_calls(ranks, tmp_path / "checkpoints")
    print(ranks, found)
    assert len(found) == ranks
    # Rank 0 reads the headers and the content of each of the N shards.
    assert sum(one["opens"] for one in found) == 2 * ranks
    assert [one["plans"] for one in found] == [1] + [0] * (ranks - 1), "one plan for two saves"


def test_the_limit_of_open_files_is_raised_or_refused() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        raise_descriptor_limit(2)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 310
        with pytest.raises(UserError, match=r"ranks need about .* open files per process"):
            raise_descriptor_limit(10**9)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
