"""The process of each rank of `launch doctor`: two real ranks over gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.diagnose.doctor import format_node_table, read_reports
from launch.diagnose.findings import describe_expected_exchange, find_problems
from launch.slurm.sbatch import Resources

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
REQUESTED = Resources(nodes=1, tasks_per_node=RANKS)


@pytest.mark.distributed
def test_two_ranks_measure_the_bandwidth_between_them(tmp_path: Path) -> None:
    (tmp_path / ".doctor-abc").touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_PORT": port}
    common |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    words = ["--folder", str(tmp_path), "--marker", "abc", "--gpus", "0"]
    running = []
    for rank in range(RANKS):
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "launch.diagnose.probe", *words]
        running.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        )
    log = "".join(process.communicate(timeout=120)[0] for process in running)
    assert all(process.returncode == 0 for process in running)
    reports = read_reports(log)
    assert [report["rank"] for report in reports] == [0, 1]
    for report in reports:
        assert report["meets"]
        assert report["all_reduce_gib_s"] > 0
        assert report["cpus"] >= 1
    assert find_problems(reports, REQUESTED, job_state="COMPLETED", log=tmp_path) == []
    expected = describe_expected_exchange(reports, REQUESTED)
    slowest = min(report["all_reduce_gib_s"] for report in reports)
    assert expected.startswith(f"all-reduce within the node: {slowest:.2f} GiB/s; ")
    assert f"{reports[0]['all_reduce_gib_s']:.2f}" in format_node_table(reports)
