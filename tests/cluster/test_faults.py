"""Faults of a cluster, applied to real jobs: two nodes with two ranks each, and a stand-in trainer.

The job must continue or end correctly, its log must report the fault, and no process may be left
on the nodes.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.slurm.job_records import find_newest_step
from tests.cluster.conftest import ROOT, Submit
from tests.cluster.slurm import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
STEPS = 25


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left_on_the_nodes(cluster: Cluster) -> "object":
    yield
    cluster.run("scancel", "--user=root")
    cluster.wait_for(lambda: not cluster.run("squeue", "-h").strip(), 60, "an empty queue")

    def left() -> list[str]:
        return [
            line
            for node in cluster.address
            if node in cluster.processes
            for line in cluster.processes_of(node)
        ]

    cluster.wait_for(lambda: not left(), 10, lambda: f"an end of {left()}")


def read_log(run: Path, job_id: str) -> str:
    return (run / "jobs" / f"{job_id}_0_log.out").read_text()


def read_steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "trace.jsonl").read_text().splitlines()]


def wait_for_step(cluster: Cluster, run: Path, step: int) -> None:
    cluster.wait_for(lambda: find_newest_step(run) >= step, 60, f"step {step} of {run.name}")


def expect_completion(cluster: Cluster, run: Path, job_id: str, *, restarts: int) -> str:
    """Wait for a successful end; returns the log."""
    ended = cluster.wait_state(job_id, timeout_s=240)
    log = read_log(run, job_id)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), log + cluster.log(
        "slurmctld"
    )
    assert int(ended["Restarts"]) == restarts, log
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert read_steps(run)[-1] == STEPS
    return log


def test_after_a_stop_on_request_the_job_is_requeued_and_continues(
    cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    job_id = submit(tmp_path, save_s=1)
    wait_for_step(cluster, tmp_path, 5)
    cluster.run("scancel", "--signal=USR2", job_id)
    log = expect_completion(cluster, tmp_path, job_id, restarts=1)
    assert read_steps(tmp_path) == list(range(1, STEPS + 1)), "no step was done twice"
    assert "start 1 on node" in log
    assert "stopped on request, all is saved; saved up to step" in log
    assert "requeued; it continues" in log
    assert "continues from step" in log


def test_a_task_of_an_array_is_requeued_without_the_others(
    cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    """One task of an array has the id of the whole array as its job id."""
    one_node = {"nodes": 1, "tasks_per_node": 1}
    (tmp_path / "task_1" / "checkpoints" / f"step_{STEPS}").mkdir(
        parents=True
    )  # this task has no work left
    array = submit(tmp_path, array="0-2", resources=one_node, save_s=1)
    cluster.wait_state(f"{array}_1", "COMPLETED")
    rows = cluster.run("squeue", "-h", "-r", "-j", array, "-o", "%i %A").splitlines()
    base = next(task for task, job_id in map(str.split, rows) if job_id == array)
    others = sorted({f"{array}_0", f"{array}_2"} - {base})
    for task in (base, *others):
        wait_for_step(cluster, tmp_path / f"task_{task.split('_')[1]}", 5)
    cluster.run("scancel", "--signal=USR2", base)
    for task, restarts in ((base, "1"), *((other, "0") for other in others)):
        ended = cluster.wait_state(task, timeout_s=240)
        log = read_log(tmp_path, task)
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == (
            "COMPLETED",
            "0:0",
            restarts,
        ), log
        run = tmp_path / f"task_{task.split('_')[1]}"
        assert read_steps(run) == list(range(1, STEPS + 1)), log


def test_exported_variables_reach_the_ranks_with_export_none(
    cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    """`--export=NONE`, the default of some centres, also applies to srun."""
    expect_completion(cluster, tmp_path, submit(tmp_path, "--export=NONE"), restarts=0)


@pytest.mark.parametrize(
    ("kind", "exit_code", "message"),
    [
        ("exception", "1:0", "ended with exit code 1"),
        ("kill", "137", "was killed by SIGKILL"),
        ("exit3", "3:0", "code 3"),
    ],
)
def test_a_failed_rank_ends_the_job_soon_and_is_named(
    kind: str, exit_code: str, message: str, cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    job_id = submit(tmp_path, fail=f"3:7:{kind}")
    ended = cluster.wait_state(job_id, timeout_s=60)
    log = read_log(tmp_path, job_id)
    assert ended["JobState"] == "FAILED", log
    assert ended["Restarts"] == "0"
    assert ended["ExitCode"] == exit_code or kind == "kill"
    *_, verdict, next_line = log.splitlines()
    assert "first failure: rank 3 on node" in verdict
    assert message in verdict
    assert f"not requeued, exit code {exit_code.split(':')[0]}" in next_line
    if kind == "exception":
        assert log.splitlines()[-3] == "  3: ValueError: the planted mistake"


def test_a_rank_over_its_memory_limit_is_named(
    cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    job_id = submit(tmp_path, fail="3:7:memory", resources={"mem_gib": 1})
    ended = cluster.wait_state(job_id, timeout_s=60)
    log = read_log(tmp_path, job_id)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "137:0", "0"), (
        log
    )
    assert re.search(
        r"first failure: out of memory according to SLURM: ranks 2, 3 on node\d used 1\.\d+ of the 1\.00 ",
        log,
    )


def test_a_cancelled_job_is_not_requeued(cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    job_id = submit(tmp_path, save_s=1)
    wait_for_step(cluster, tmp_path, 5)
    cluster.run("scancel", job_id)
    ended = cluster.wait_state(job_id)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    time.sleep(3)
    assert cluster.state(job_id) == "CANCELLED"
    assert find_newest_step(tmp_path) >= 6, "the ranks had time to save"
    again = cluster.sbatch(tmp_path / "stand-in.sbatch")
    expect_completion(cluster, tmp_path, again, restarts=0)
    assert read_steps(tmp_path) == list(range(1, STEPS + 1)), "submitted again, it continued"


def test_a_preempted_job_continues_after_the_other_job(
    cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    job_id = submit(tmp_path, "--partition=preemptible")
    wait_for_step(cluster, tmp_path, 5)
    urgent = cluster.sbatch(
        "-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2"
    )
    cluster.wait_state(urgent, "COMPLETED")
    expect_completion(cluster, tmp_path, job_id, restarts=1)
    assert read_steps(tmp_path) == list(range(1, STEPS + 1))


def test_a_requeue_by_hand_loses_at_most_the_steps_since_the_last_checkpoint(
    cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    job_id = submit(tmp_path)
    wait_for_step(cluster, tmp_path, 5)
    cluster.run("scontrol", "requeue", job_id)
    expect_completion(cluster, tmp_path, job_id, restarts=1)
    done = read_steps(tmp_path)
    assert len(done) - STEPS <= 5
    assert sorted(set(done)) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("which", ["first", "second"])
def test_a_job_continues_after_a_node_dies(
    which: str, cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    job_id = submit(tmp_path)
    wait_for_step(cluster, tmp_path, 5)
    nodes = cluster.run("scontrol", "show", "hostnames", cluster.job(job_id)["NodeList"]).split()
    dead = nodes[0 if which == "first" else 1]
    cluster.kill_node(dead)
    cluster.run(
        "scontrol", "update", f"NodeName={dead}", "State=DOWN", "Reason=health"
    )  # saves a wait of 20 s
    log = expect_completion(cluster, tmp_path, job_id, restarts=1)
    assert len(read_steps(tmp_path)) - STEPS <= 5
    assert f"start 2 on {' (ranks 0-1), '.join(n for n in cluster.address if n != dead)}" in log


def test_restarts_without_progress_are_limited(
    cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    job_id = submit(tmp_path, idle=1, restarts=1)
    ended = cluster.wait_state(job_id)
    log = read_log(tmp_path, job_id)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1"), log
    assert "1 of at most 1 restarts in a row made no progress" in log
    assert "not requeued: 2 restarts in a row without progress" in log


def test_a_restart_of_the_controller_does_not_disturb_a_job(
    cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    job_id = submit(tmp_path)
    wait_for_step(cluster, tmp_path, 5)
    cluster.restart_controller()
    expect_completion(cluster, tmp_path, job_id, restarts=0)


def test_a_full_disk_loses_log_lines_but_not_the_run(
    cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    log = cluster.small_disk / "log"
    job_id = submit(tmp_path, f"--output={log}", noise=20_000)
    assert cluster.wait_state(job_id)["JobState"] == "COMPLETED"
    assert log.stat().st_size > 100_000
    assert read_steps(tmp_path)[-1] == STEPS


def test_each_rank_sees_the_gpus_of_its_node(cluster: Cluster, tmp_path: Path) -> None:
    show = "srun --label bash -c 'echo $(hostname) $SLURM_LOCALID $CUDA_VISIBLE_DEVICES'"
    options = ("-N2", "--ntasks-per-node=2", "--gpus-per-node=2", "-o", tmp_path / "log")
    assert cluster.wait_state(cluster.sbatch(*options, "--wrap", show))["JobState"] == "COMPLETED"
    rows = sorted((tmp_path / "log").read_text().splitlines())
    assert [row.split()[2:] for row in rows] == [
        ["0", "0,1"],
        ["1", "0,1"],
        ["0", "0,1"],
        ["1", "0,1"],
    ]
    assert len({row.split()[1] for row in rows}) == 2


def test_a_second_cluster_on_this_machine_uses_another_network(
    cluster: Cluster, tmp_path: Path
) -> None:
    other = "import sys, pathlib; from tests.cluster.slurm import Cluster; c = Cluster(pathlib.Path(sys.argv[1]))"
    before = set(os.listdir("/sys/class/net"))
    assert len([name for name in before if name.startswith(cluster.bridge)]) == 1 + len(
        cluster.address
    )
    subprocess.run(
        [sys.executable, "-c", f"{other}; c._start_network(); c.__exit__()", tmp_path],
        cwd=ROOT,
        check=True,
    )
    assert before <= set(os.listdir("/sys/class/net"))


@pytest.mark.long
@pytest.mark.parametrize("which", [0, 1])
def test_a_dead_node_is_detected_by_slurm(
    which: int, cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    job_id = submit(tmp_path)
    wait_for_step(cluster, tmp_path, 5)
    nodes = cluster.run("scontrol", "show", "hostnames", cluster.job(job_id)["NodeList"]).split()
    cluster.kill_node(nodes[which])
    expect_completion(cluster, tmp_path, job_id, restarts=1)
    assert len(read_steps(tmp_path)) - STEPS <= 5


@pytest.mark.long
def test_a_stop_while_the_controller_is_down(
    cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    job_id = submit(tmp_path, save_s=4)
    wait_for_step(cluster, tmp_path, 5)
    cluster.run("scancel", "--signal=USR2", job_id)
    cluster.stop_controller()
    time.sleep(10)
    cluster.start_controller()
    expect_completion(cluster, tmp_path, job_id, restarts=1)
    assert read_steps(tmp_path) == list(range(1, STEPS + 1))


@pytest.mark.long
@pytest.mark.parametrize("signal_s", [60, 1])
def test_the_time_limit(signal_s: int, cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    """A request to save before the limit; if it comes too late, SIGTERM at the limit."""
    limit = "00:02:00" if signal_s == 60 else "00:01:00"
    job_id = submit(
        tmp_path, steps=STEPS, step_s=3, resources={"time": limit, "signal_s": signal_s}
    )
    log = expect_completion(cluster, tmp_path, job_id, restarts=1)
    assert read_steps(tmp_path) == list(range(1, STEPS + 1)), log
    assert "stopped on request" in log


@pytest.mark.long
def test_under_torchrun_a_job_stops_and_continues(
    cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    job_id = submit(tmp_path, launcher="torchrun", step_s=0.4)
    wait_for_step(cluster, tmp_path, 5)
    cluster.run("scancel", "--signal=USR2", job_id)
    expect_completion(cluster, tmp_path, job_id, restarts=1)
    assert read_steps(tmp_path) == list(range(1, STEPS + 1))
