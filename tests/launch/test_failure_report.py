"""The rank that failed first, from the output of srun and the ranks.

The logs below are from real jobs, shortened.
"""

import pytest

from launch.slurm.failure_report import (
    FailureReport,
    LogReader,
    Outcome,
    expand_index_ranges,
    list_ranks_by_node,
    parse_exit_code,
)

PEER_GONE = [
    "{}: Traceback (most recent call last):",
    '{}:   File "step.py", line 9, in run',
    "{}: RuntimeError: [pair.cc:547] Connection closed by peer [10.0.0.2]:3377",
    "{}: liverseg rank {} on node{} ended with exit code 1; peak memory 0.41 GiB",
]


def format_peer_lines(rank: int) -> list[str]:
    return [line.format(rank, rank, 1 + rank // 2) for line in PEER_GONE]


def read_report(
    *lines: str, returncode: int = 1, ranks_per_task: int = 1, stopped: bool = False
) -> FailureReport:
    reader = LogReader(ranks_per_task)
    for line in lines:
        reader.read_line(line + "\n")
    return reader.build_report(returncode, stopped)


def test_the_rank_that_raised_is_named_even_if_others_were_reported_before_it() -> None:
    report = read_report(
        "0: step 7",
        *format_peer_lines(0),
        "3: Traceback (most recent call last):",
        "3: ValueError: the real reason",
        "3: liverseg rank 3 on node2 ended with exit code 1; peak memory 1.50 GiB",
        *format_peer_lines(2),
        "srun: error: node1: tasks 0-1: Exited with exit code 1",
        "srun: launch/slurm: _step_signal: Terminating StepId=7.0",
        "srun: error: node2: tasks 2-3: Exited with exit code 1",
    )
    assert report.outcome is Outcome.FAILED
    assert report.exit_code == 1
    assert report.summary == "first failure: rank 3 on node2 ended with exit code 1"
    assert report.evidence == (
        "  3: Traceback (most recent call last):",
        "  3: ValueError: the real reason",
    )


def test_a_killed_rank_is_named_although_it_printed_nothing() -> None:
    report = read_report(
        "1: liverseg rank 1 on node1 was killed by SIGKILL; peak memory 61.90 GiB",
        *format_peer_lines(0),
        "srun: error: node1: task 0: Exited with exit code 1",
        "srun: error: node1: task 1: Exited with exit code 137",
        returncode=137,
    )
    assert (report.outcome, report.exit_code) == (Outcome.FAILED, 137)
    assert (
        "rank 1 on node1 was killed by SIGKILL at 61.90 GiB; the most frequent cause is memory"
        in report.summary
    )


def test_the_node_over_its_memory_limit_is_named_when_slurm_kills_the_step() -> None:
    """JobAcctGatherParams=OverMemoryKill: every rank is killed."""
    report = read_report(
        "slurmstepd-node1: error: Exceeded job memory limit",
        "2: slurmstepd-node2: error: StepId=8854854.0 exceeded memory limit (1127333888 > 1073741824), being killed",
        "srun: error: node1: tasks 0-1: Killed",
        "srun: error: node2: tasks 2-3: Killed",
        returncode=137,
    )
    assert (report.outcome, report.exit_code) == (Outcome.FAILED, 137)
    assert "ranks 2, 3 on node2 used 1.05 of the 1.00 GiB per node" in report.summary


def test_out_of_memory_reported_by_slurm_is_in_the_summary() -> None:
    report = read_report(
        "0: liverseg rank 0 on node1 was killed by SIGKILL; peak memory 3.00 GiB",
        "slurmstepd: error: Detected 1 oom_kill event in StepId=12.0. Some of the step tasks have been OOM Killed.",
        "srun: error: node1: task 0: Out Of Memory",
        returncode=137,
    )
    assert report.summary.startswith(
        "first failure: out of memory according to SLURM: rank 0 on node1"
    )


def test_lost_connections_without_another_error_are_not_a_failure() -> None:
    report = read_report(
        *format_peer_lines(0),
        *format_peer_lines(1),
        "srun: error: node1: tasks 0-1: Exited with exit code 1",
    )
    assert report.outcome is Outcome.LOST
    assert "node or the network" in report.summary


def test_a_lost_node_is_named() -> None:
    report = read_report(
        "srun: error: Node failure on node2",
        *format_peer_lines(0),
        "srun: error: node1: tasks 0-1: Killed",
    )
    assert report.outcome is Outcome.LOST
    assert "node2" in report.summary


def test_a_user_error_keeps_its_exit_code() -> None:
    lines = [f"{r}: liverseg: train.max_steps = 0: at least 1" for r in range(2)]
    ends = [
        f"{r}: liverseg rank {r} on n1 ended with exit code 2; peak memory 0.1 GiB"
        for r in range(2)
    ]
    report = read_report(*lines, *ends, returncode=2)
    assert (report.outcome, report.exit_code) == (Outcome.FAILED, 2)
    assert report.evidence == ("  0: liverseg: train.max_steps = 0: at least 1",)


@pytest.mark.parametrize(
    "rest", ["srun: error: n1: task 1: Killed", "srun: error: n1: task 1: Terminated"]
)
def test_one_rank_that_stopped_on_request_decides_the_outcome(rest: str) -> None:
    assert (
        read_report(
            "srun: error: n1: task 0: Exited with exit code 75", rest, returncode=137
        ).outcome
        is Outcome.STOPPED
    )


def test_under_torchrun_the_run_folder_reports_the_stop() -> None:
    line = "srun: error: n1: task 0: Exited with exit code 1"
    assert read_report(line, stopped=True, ranks_per_task=2).outcome is Outcome.STOPPED


def test_a_signal_before_the_ranks_could_save_is_an_interruption() -> None:
    lines = [
        f"{r}: liverseg rank {r} on n1 was killed by SIGUSR2; peak memory 0.1 GiB" for r in range(2)
    ]
    assert read_report(*lines, returncode=140).outcome is Outcome.INTERRUPTED
    assert (
        read_report("srun: error: n1: tasks 0-1: User defined signal 2", returncode=140).outcome
        is Outcome.INTERRUPTED
    )


def test_under_torchrun_lines_have_the_label_of_the_node() -> None:
    report = read_report(
        "1: Traceback (most recent call last):",
        "1: ValueError: the real reason",
        "1: liverseg rank 5 on node2 ended with exit code 1; peak memory 0.1 GiB",
        "srun: error: node2: task 1: Exited with exit code 1",
        ranks_per_task=4,
    )
    assert report.summary == "first failure: rank 5 on node2 ended with exit code 1"
    assert report.evidence[-1] == "  5: ValueError: the real reason"


def test_under_torchrun_nodes_that_cannot_connect_are_not_a_failure() -> None:
    report = read_report(
        "1: liverseg: torchrun: node 1 cannot meet the others at node1:29500; has one failed to start, or is the "
        "network gone? (The client socket has timed out after 600000ms while trying to connect to (node1, 29500).)",
        "srun: error: node2: task 1: Exited with exit code 1",
        ranks_per_task=4,
    )
    assert report.outcome is Outcome.INTERRUPTED


def test_an_error_of_srun_itself_is_the_summary() -> None:
    report = read_report(
        "srun: error: Unable to create step for job 5: Requested node configuration is not available"
    )
    assert report.outcome is Outcome.FAILED
    assert report.summary.startswith("Unable to create step")


def test_helpers_for_srun_texts() -> None:
    assert read_report(returncode=0).outcome is Outcome.DONE
    assert [parse_exit_code(t) for t in ("Exited with exit code 3", "Killed", "Segmentation fault (core dumped)")] == [
        3, 137, 139,
    ]  # fmt: skip
    assert expand_index_ranges("0-2,5,7-8") == (0, 1, 2, 5, 7, 8)
    assert list_ranks_by_node(["a", "b", "c"], "2(x2),1") == {"a": "0-1", "b": "2-3", "c": "4"}
