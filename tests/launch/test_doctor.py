"""The findings of the doctor, each with its remedy.

The real job is tested in tests/cluster/test_training.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.cli import run
from launch.diagnose.doctor import format_node_table, read_reports
from launch.diagnose.findings import describe_expected_exchange, find_problems
from launch.diagnose.probe import LINE_PREFIX
from launch.slurm.sbatch import Resources

LOG = Path(__file__)  # any file that exists
REQUESTED = Resources(nodes=2, tasks_per_node=1)


def make_report(number: int, **changes: Any) -> dict[str, Any]:
    good = {
        "rank": number, "node": f"node{number + 1}", "versions": {"torch": "2.13.0", "code": "abc"}, "gpus": [],
        "sees_folder": True, "write_mib_s": 300.0, "meets": True, "clock_s": 0.001, "all_reduce_gib_s": 2.0,
    }  # fmt: skip
    return {key: value for key, value in (good | changes).items() if value is not None}


def test_two_nodes_without_problems_are_ready() -> None:
    assert (
        find_problems([make_report(0), make_report(1)], REQUESTED, job_state="COMPLETED", log=LOG)
        == []
    )


def test_the_bandwidth_is_explained_in_milliseconds_per_step() -> None:
    reports = [make_report(0), make_report(1, all_reduce_gib_s=0.5)]
    line = describe_expected_exchange(reports, REQUESTED)
    # 40 MB over the slowest rank's 0.5 GiB/s.
    assert line.startswith("all-reduce between nodes: 0.50 GiB/s; ")
    assert "take 75 ms a step" in line
    assert describe_expected_exchange([make_report(0, all_reduce_gib_s=None)], REQUESTED) == ""


@pytest.mark.parametrize(
    ("changes", "level", "what", "remedy"),
    [
        (
            {"sees_folder": False, "write_mib_s": None},
            "problem",
            "node2 does not see the folder",
            "all nodes share",
        ),
        (
            {"write_error": "No space left on device"},
            "problem",
            "cannot write there: No space",
            "quota",
        ),
        ({"write_mib_s": 9.0}, "warning", "node2 writes 9 MiB/s", "checkpoint.every_steps"),
        ({"locks": False}, "warning", "no file locks on node2", "-o flock"),
        (
            {"meets": False, "network_error": "timed out"},
            "problem",
            "rank 1 on node2 cannot connect to the other ranks",
            "SOCKET_IFNAME",
        ),
        ({"meets": None}, "problem", "it ended during the test", "SOCKET_IFNAME"),
        ({"clock_s": -7.25}, "warning", "the clock of node2 is -7.2 s off", "chrony"),
        ({"all_reduce_gib_s": 0.01}, "warning", "0.01 GiB/s between nodes", "NCCL_SOCKET_IFNAME"),
        (
            {"cpu_nodes": [0], "gpu_node": 1},
            "warning",
            "rank 1 on node2 has its GPU on NUMA node 1, but CPUs of node 0 only",
            "--cpu-bind none",
        ),
        (
            {"versions": {"torch": "2.8.0", "code": "abc"}},
            "problem",
            "torch differs: 2.13.0 on node1",
            "one .venv",
        ),
    ],
)
def test_each_finding_has_its_remedy(
    changes: dict[str, Any], level: str, what: str, remedy: str
) -> None:
    (found,) = find_problems(
        [make_report(0), make_report(1, **changes)], REQUESTED, job_state="COMPLETED", log=LOG
    )
    assert found.level == level
    assert what in found.what
    assert remedy in found.remedy


def test_gpus_must_be_visible_and_free() -> None:
    requested = Resources(nodes=2, gpus_per_node=1)
    busy, none = find_problems(
        [make_report(0, gpus=[[10.0, 80.0]]), make_report(1)],
        requested,
        job_state="COMPLETED",
        log=LOG,
    )[::-1]
    assert "rank 1 on node2 sees no GPU" in none.what
    assert "GPU 0 of node1 has 10 of 80 GiB free" in busy.what
    assert "exclude=node1" in busy.remedy


def test_missing_reports_are_problems() -> None:
    (missing,) = find_problems([make_report(0)], REQUESTED, job_state="FAILED", log=LOG)
    assert "rank 1 of 2 printed no report" in missing.what
    (no_report,) = find_problems([], REQUESTED, job_state="FAILED", log=LOG)
    assert "no rank printed a report (job FAILED)" in no_report.what
    (no_log,) = find_problems([], REQUESTED, job_state="FAILED", log=Path("/nowhere/log"))
    assert "was never written" in no_log.what


def test_reports_are_read_from_a_labelled_log() -> None:
    parts = [
        {"rank": 1, "node": "b"},
        {"rank": 0, "node": "a"},
        {"rank": 1, "node": "b", "meets": True},
    ]
    log = "\n".join(
        [
            "liverseg job 7: start",
            *(f"{p['rank']}: {LINE_PREFIX}{json.dumps(p)}" for p in parts),
            f"0: {LINE_PREFIX}{{",
        ]
    )
    assert read_reports(log) == [parts[1], parts[2]]
    assert [line.split()[0] for line in format_node_table(read_reports(log)).splitlines()] == [
        "node",
        "a",
        "b",
    ]


def test_on_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [
        "doctor",
        "--cluster",
        "local",
        "--tasks-per-node",
        "2",
        "--job-dir",
        str(tmp_path / "runs"),
        "--json",
    ]
    assert run(words) == 0, capsys.readouterr()
    *_, verdict, last = capsys.readouterr().out.splitlines()
    assert verdict == "verdict: ready"
    assert [report["meets"] for report in json.loads(last)["ranks"]] == [True, True]
    assert not list((tmp_path / "runs").glob(".doctor-*"))


def test_arguments_of_a_command_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "run.dir=x"]) == 2
    assert "doctor takes no run.dir=x" in capsys.readouterr().err
