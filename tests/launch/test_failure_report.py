"""Who failed first, from what srun and the ranks said. The logs below are from real jobs, shortened."""

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


def peer(rank: int) -> list[str]:
    return [line.format(rank, rank, 1 + rank // 2) for line in PEER_GONE]


def verdict(
    *lines: str, returncode: int = 1, ranks_per_task: int = 1, stopped: bool = False
) -> FailureReport:
    reader = LogReader(ranks_per_task)
    for line in lines:
        reader.read_line(line + "\n")
    return reader.build_report(returncode, stopped)


def test_the_rank_that_raised_is_named_though_its_peers_were_reported_first() -> None:
    found = verdict(
        "0: step 7",
        *peer(0),
        "3: Traceback (most recent call last):",
        "3: ValueError: the real reason",
        "3: liverseg rank 3 on node2 ended with exit code 1; peak memory 1.50 GiB",
        *peer(2),
        "srun: error: node1: tasks 0-1: Exited with exit code 1",
        "srun: launch/slurm: _step_signal: Terminating StepId=7.0",
        "srun: error: node2: tasks 2-3: Exited with exit code 1",
    )
    assert found.outcome is Outcome.FAILED
    assert found.exit_code == 1
    assert found.summary == "first failure: rank 3 on node2 ended with exit code 1"
    assert found.evidence == (
        "  3: Traceback (most recent call last):",
        "  3: ValueError: the real reason",
    )


def test_a_killed_rank_says_nothing_itself() -> None:
    found = verdict(
        "1: liverseg rank 1 on node1 was killed by SIGKILL; peak memory 61.90 GiB",
        *peer(0),
        "srun: error: node1: task 0: Exited with exit code 1",
        "srun: error: node1: task 1: Exited with exit code 137",
        returncode=137,
    )
    assert (found.outcome, found.exit_code) == (Outcome.FAILED, 137)
    assert (
        "rank 1 on node1 was killed by SIGKILL at 61.90 GiB; the most frequent cause is memory"
        in found.summary
    )


def test_where_slurm_kills_a_whole_step_for_one_nodes_memory_that_node_is_named() -> None:
    """JobAcctGatherParams=OverMemoryKill: no rank is left to speak."""
    found = verdict(
        "slurmstepd-node1: error: Exceeded job memory limit",
        "2: slurmstepd-node2: error: StepId=8854854.0 exceeded memory limit (1127333888 > 1073741824), being killed",
        "srun: error: node1: tasks 0-1: Killed",
        "srun: error: node2: tasks 2-3: Killed",
        returncode=137,
    )
    assert (found.outcome, found.exit_code) == (Outcome.FAILED, 137)
    assert "ranks 2, 3 on node2 used 1.05 of the 1.00 GiB per node" in found.summary


def test_slurms_word_on_memory_is_passed_on() -> None:
    found = verdict(
        "0: liverseg rank 0 on node1 was killed by SIGKILL; peak memory 3.00 GiB",
        "slurmstepd: error: Detected 1 oom_kill event in StepId=12.0. Some of the step tasks have been OOM Killed.",
        "srun: error: node1: task 0: Out Of Memory",
        returncode=137,
    )
    assert found.summary.startswith(
        "first failure: out of memory according to SLURM: rank 0 on node1"
    )


def test_peers_that_lost_each_other_without_a_culprit_are_no_failure() -> None:
    found = verdict(*peer(0), *peer(1), "srun: error: node1: tasks 0-1: Exited with exit code 1")
    assert found.outcome is Outcome.LOST
    assert "node or the network" in found.summary


def test_a_node_that_went_away() -> None:
    found = verdict(
        "srun: error: Node failure on node2", *peer(0), "srun: error: node1: tasks 0-1: Killed"
    )
    assert found.outcome is Outcome.LOST
    assert "node2" in found.summary


def test_a_mistake_of_the_user_keeps_its_exit_code() -> None:
    lines = [f"{r}: liverseg: train.max_steps = 0: at least 1" for r in range(2)]
    ends = [
        f"{r}: liverseg rank {r} on n1 ended with exit code 2; peak memory 0.1 GiB"
        for r in range(2)
    ]
    found = verdict(*lines, *ends, returncode=2)
    assert (found.outcome, found.exit_code) == (Outcome.FAILED, 2)
    assert found.evidence == ("  0: liverseg: train.max_steps = 0: at least 1",)


@pytest.mark.parametrize(
    "rest", ["srun: error: n1: task 1: Killed", "srun: error: n1: task 1: Terminated"]
)
def test_stopped_on_request_is_told_by_any_rank(rest: str) -> None:
    assert (
        verdict("srun: error: n1: task 0: Exited with exit code 75", rest, returncode=137).outcome
        is Outcome.STOPPED
    )


def test_under_torchrun_the_run_folder_tells_of_the_stop() -> None:
    line = "srun: error: n1: task 0: Exited with exit code 1"
    assert verdict(line, stopped=True, ranks_per_task=2).outcome is Outcome.STOPPED


def test_ended_by_the_signal_before_it_could_save() -> None:
    lines = [
        f"{r}: liverseg rank {r} on n1 was killed by SIGUSR2; peak memory 0.1 GiB" for r in range(2)
    ]
    assert verdict(*lines, returncode=140).outcome is Outcome.INTERRUPTED
    assert (
        verdict("srun: error: n1: tasks 0-1: User defined signal 2", returncode=140).outcome
        is Outcome.INTERRUPTED
    )


def test_under_torchrun_lines_are_labelled_by_node_and_ranks_by_their_number() -> None:
    found = verdict(
        "1: Traceback (most recent call last):",
        "1: ValueError: the real reason",
        "1: liverseg rank 5 on node2 ended with exit code 1; peak memory 0.1 GiB",
        "srun: error: node2: task 1: Exited with exit code 1",
        ranks_per_task=4,
    )
    assert found.summary == "first failure: rank 5 on node2 ended with exit code 1"
    assert found.evidence[-1] == "  5: ValueError: the real reason"


def test_under_torchrun_nodes_that_could_not_meet_are_no_failure_of_the_job() -> None:
    found = verdict(
        "1: liverseg: torchrun: node 1 cannot meet the others at node1:29500; has one failed to start, or is the "
        "network gone? (The client socket has timed out after 600000ms while trying to connect to (node1, 29500).)",
        "srun: error: node2: task 1: Exited with exit code 1",
        ranks_per_task=4,
    )
    assert found.outcome is Outcome.INTERRUPTED


def test_srun_itself_could_not_start() -> None:
    found = verdict(
        "srun: error: Unable to create step for job 5: Requested node configuration is not available"
    )
    assert found.outcome is Outcome.FAILED
    assert found.summary.startswith("Unable to create step")


def test_small_parts() -> None:
    assert verdict(returncode=0).outcome is Outcome.DONE
    assert [parse_exit_code(t) for t in ("Exited with exit code 3", "Killed", "Segmentation fault (core dumped)")] == [
        3, 137, 139,
    ]  # fmt: skip
    assert expand_index_ranges("0-2,5,7-8") == (0, 1, 2, 5, 7, 8)
    assert list_ranks_by_node(["a", "b", "c"], "2(x2),1") == {"a": "0-1", "b": "2-3", "c": "4"}
