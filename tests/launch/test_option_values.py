"""Values of `launch` options: what could change a batch file or the rendezvous is refused."""

import argparse
from collections.abc import Callable

import pytest

from launch.slurm.current_job import CurrentJob
from launch.slurm.option_values import (
    environment_assignment,
    job_ids,
    job_name,
    non_negative_int,
    parse_resource,
    positive_int,
    printable_text,
)
from liverseg_dist.errors import UserError


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (positive_int, "8", 8),
        (non_negative_int, "0", 0),
        (printable_text, "a100 nodes", "a100 nodes"),
        (job_name, "fold_0", "fold_0"),
        (job_ids, "12:34_1", "12:34_1"),
        (environment_assignment, "NCCL_DEBUG=INFO", "NCCL_DEBUG=INFO"),
        (environment_assignment, "EMPTY=", "EMPTY="),
    ],
)
def test_good_values(parse: Callable[[str], object], text: str, value: object) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (positive_int, "0", "at least 1"),
        (positive_int, "-3", "at least 1"),
        (positive_int, "1_000", "at least 1"),
        (positive_int, "٣", "at least 1"),  # a digit of another script, which int() accepts
        (non_negative_int, "1.5", "0 or more"),
        (printable_text, "", "empty"),
        (printable_text, "gpu\n#SBATCH --uid=0", "control characters"),
        (printable_text, " gpu", "spaces"),
        (job_name, "a/b", "no spaces, / or %"),
        (job_name, "%j", "no spaces, / or %"),
        (job_name, "--wrap", "does not begin with -"),
        (job_ids, "12,34", "join several with ':'"),
        (job_ids, "12:", "a job id"),
        (environment_assignment, "NAME", "NAME=VALUE"),
        (environment_assignment, "1A=2", "NAME=VALUE"),
        (environment_assignment, "A=1\nB=2", "NAME=VALUE"),
        (environment_assignment, "RANK=3", "is set by launch or SLURM"),
        (environment_assignment, "SLURM_PROCID=3", "is set by launch or SLURM"),
    ],
)
def test_refused_values(parse: Callable[[str], object], text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("name", "text"), [("time", "soon"), ("mem", "much"), ("cpus-per-task", "0"), ("account", "")]
)
def test_a_wrong_resource_names_its_option(name: str, text: str) -> None:
    with pytest.raises(UserError, match="--stage-option"):
        parse_resource(name, text, "--stage-option")


def test_the_task_of_an_array_is_one_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number alone may mean the whole array, which scancel would then end."""
    for name, value in {
        "SLURM_JOB_ID": "71",
        "SLURM_ARRAY_JOB_ID": "70",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_JOB_NAME": "cv",
        "SLURM_RESTART_COUNT": "2",
        "SLURM_JOB_NODELIST": "node[01-02]",
        "SLURM_TASKS_PER_NODE": "4(x2)",
    }.items():
        monkeypatch.setenv(name, value)
    # scontrol needs the configuration of a cluster, also to expand names.
    monkeypatch.setattr("launch.slurm.current_job.expand_hostnames", lambda nodes: [nodes])
    job = CurrentJob.from_environment()
    assert (job.job_id, job.name, job.start) == ("70_3", "cv", 2)
    assert (job.nodes, job.tasks_per_node) == (("node[01-02]",), "4(x2)")
    assert not job.is_local
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID")
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    job = CurrentJob.from_environment()
    assert (job.job_id, job.start) == ("71", 0)


def test_a_job_without_slurm_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SUBMITIT_LOCAL_JOB_ID", raising=False)
    job = CurrentJob.from_environment()
    assert (job.job_id, job.is_local, len(job.nodes)) == ("local", True, 1)
