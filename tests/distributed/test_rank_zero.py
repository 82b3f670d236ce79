"""Work of rank 0: the other ranks get its result or its error, and none of them does the work."""

from pathlib import Path

import pytest

from liverseg_dist.distributed.rank_zero import share_from_rank0
from liverseg_dist.errors import RunFailed, UserError
from tests.distributed.launch import torchrun

JOB = """
from liverseg_dist.distributed.rank_zero import share_from_rank0
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import LiversegError

def fail():
    raise OSError(28, "No space left on device", "/data/run/config.yaml")

world = World.from_environment("cpu")
with world.connected(60):
    rank = world.global_rank
    lines = [f"{rank} result {share_from_rank0(lambda: f'made by {rank}')}"]
    try:
        share_from_rank0(fail)
    except LiversegError as error:
        lines.append(f"{rank} error {error}")
    lines.append(f"{rank} local {world.call_on_rank0(lambda: rank)}")
    lines.append(f"{rank} writer {world.select_for_rank(lambda: 'file', lambda: 'null')}")
    print("\\n".join(lines), flush=True)
"""


@pytest.mark.distributed
def test_all_ranks_share_the_result_and_the_error_of_rank_0(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    done = torchrun(2, str(tmp_path / "job.py"))
    assert done.returncode == 0, done.stderr
    error = (
        "error /data/run/config.yaml: No space left on device; "
        "free some space and run the same line again"
    )
    expected = ["result made by 0", error]
    lines = done.stdout.splitlines()
    for rank, local, writer in (("0", "0", "file"), ("1", "None", "null")):
        own = [line[2:] for line in lines if line.startswith(f"{rank} ")]
        assert own == [*expected, f"local {local}", f"writer {writer}"]


def test_a_single_process_does_the_work_itself() -> None:
    def fail() -> None:
        raise UserError("no such file")

    assert share_from_rank0(lambda: 7) == 7
    with pytest.raises(UserError, match="no such file"):
        share_from_rank0(fail)
    with pytest.raises(RunFailed, match="full disk"):
        share_from_rank0(lambda: (_ for _ in ()).throw(OSError("full disk")))
