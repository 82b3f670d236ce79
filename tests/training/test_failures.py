"""A rank dies, hangs or computes nonsense: one line names it, the story lies in a file. Real processes."""

import json
import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from liverseg_dist.distributed.connection_errors import is_consequence
from liverseg_dist.distributed.stragglers import Heartbeat, find_stragglers
from liverseg_dist.distributed.strategies.ddp import DataParallel
from liverseg_dist.errors import EXIT_FAILED
from tests.distributed.launch import clean_environment, liverseg, torchrun, torchrun_command
from tests.training.test_resume import arguments, sha256, wait_for_step

LONG = (
    "validation.every_steps=0",
    "train.max_steps=100000",
    "train.learning_rate=1e-5",
    "train.global_batch_size=2",
)


def rank_process(parent: int, rank: int) -> int:
    """The process id of a rank that torchrun has started."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"torchrun has no rank {rank}")


def ended_after(how: signal.Signals, output: str, run: Path, *command: str) -> str:
    """stderr of two ranks, the second of which gets signal `how` after some steps."""
    log = run.parent / "stderr"
    with log.open("w") as stderr:
        job = subprocess.Popen(
            torchrun_command(2, *command),
            env=clean_environment(),
            start_new_session=True,
            stdout=stderr,
            stderr=stderr,
        )
    try:
        wait_for_step(run, 3, job)
        struck = rank_process(job.pid, 1)
        os.kill(struck, how)
        end = time.monotonic() + 90
        while output not in log.read_text() and time.monotonic() < end:
            time.sleep(0.2)
        if (
            how == signal.SIGSTOP
        ):  # a rank is in a session of its own, and asleep it does not notice its launcher's end
            with suppress(ProcessLookupError):
                os.kill(struck, signal.SIGKILL)
        else:
            assert job.wait(60) != 0
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait(30)
    return log.read_text()


@pytest.mark.distributed
def test_a_killed_rank_is_reported_and_the_resumed_run_has_the_same_bytes(
    phantom_store: Path, tmp_path: Path
) -> None:
    exact = ("train.max_steps=8", "validation.every_steps=0")
    output = ended_after(
        signal.SIGKILL,
        "is lost",
        tmp_path / "run",
        *arguments(phantom_store, tmp_path / "run", *exact),
    )
    assert "liverseg: rank 1 on" in output
    assert "is lost: no heartbeat, last activity in step" in output
    assert "liverseg_dist/training" not in output, "no traceback but torchrun's own"
    stories = list((tmp_path / "run" / "errors").glob("*_rank0.txt"))
    assert "Traceback (most recent call last)" in stories[0].read_text()
    assert torchrun(2, *arguments(phantom_store, tmp_path / "run", *exact)).returncode == 0
    assert torchrun(2, *arguments(phantom_store, tmp_path / "alone", *exact)).returncode == 0
    assert sha256(tmp_path / "run") == sha256(tmp_path / "alone")
    command = torchrun_command(
        2, "--max-restarts=1", *arguments(phantom_store, tmp_path / "again", *exact)
    )
    job = subprocess.Popen(
        command, env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for_step(tmp_path / "again", 3, job)
        os.kill(rank_process(job.pid, 1), signal.SIGKILL)
        assert job.wait(120) == 0, (
            "torchrun starts the ranks again, which go on from the newest checkpoint"
        )
    finally:
        job.kill()
        job.wait(30)
    assert sha256(tmp_path / "again") == sha256(tmp_path / "alone")


@pytest.mark.distributed
def test_a_hanging_rank_is_reported_after_the_timeout(phantom_store: Path, tmp_path: Path) -> None:
    command = [*arguments(phantom_store, tmp_path / "run", *LONG), "--timeout", "8"]
    output = ended_after(signal.SIGSTOP, "is lost", tmp_path / "run", *command)
    assert "liverseg: rank 1 on" in output
    assert "liverseg_dist/training" not in output


def test_a_diverged_run_reports_its_samples_in_one_line(
    phantom_store: Path, tmp_path: Path
) -> None:
    wild = (
        "train.learning_rate=1e30",
        "train.clip_grad_norm=0",
        "train.optimizer=sgd",
        "train.ema_decay=0",
    )
    done = liverseg(
        *arguments(phantom_store, tmp_path / "run", *wild, "validation.every_steps=0")[2:]
    )
    assert done.returncode == EXIT_FAILED
    line = next(line for line in done.stderr.splitlines() if line.startswith("liverseg: "))
    assert "is not finite; samples " in line
    assert "(phantom_" in line or "(liver_" in line
    assert "train.on_nonfinite=skip" in line
    assert "Traceback" not in done.stderr
    story = next((tmp_path / "run" / "errors").iterdir()).read_text()
    assert "Traceback (most recent call last)" in story
    assert "RunFailed" in story
    head = json.loads(story.partition("\n\n")[0])
    assert (head["rank"], head["host"]) == (0, socket.gethostname())
    assert f"step {head['step'] + 1}: " in line
    assert all(sample in line for sample in head["last_samples"])
    assert head["last_samples"]
    assert {"torch", "python", "command", "platform", "gpus"} <= head.keys()
    assert head["variables"]["OMP_NUM_THREADS"] == "1"
    assert not [name for name in head["variables"] if "TOKEN" in name or "KEY" in name]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_does_not_change_the_weights(value: float) -> None:
    net = nn.Conv3d(1, 2, 1)
    net.weight.register_hook(lambda gradient: gradient * value)
    strategy = DataParallel(
        net, torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9), 1.0, "fp32"
    )
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    strategy.backward(strategy.forward(torch.ones(1, 1, 2, 2, 2), last=True).sum())  # type: ignore[union-attr]
    assert not torch.isfinite(strategy.step(0.1, skip_if=torch.tensor(False)))
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert all(p.grad is None for p in net.parameters())


def test_ranks_that_delay_the_others_are_found() -> None:
    def sign(step: int, doing: str, age_s: float) -> Heartbeat:
        return Heartbeat(9, step, doing, age_s, "node7")

    waiting = {
        0: sign(6, "in backward", 90),
        1: sign(6, "waiting for data", 95),
        2: sign(6, "in backward", 91),
    }
    assert find_stragglers(waiting, 60) == (
        "rank 1 on node7 has been waiting for data in step 7 for 95 s; the others wait for it"
    )
    assert find_stragglers(waiting, 100) == ""
    assert (
        find_stragglers({0: sign(6, "validating", 900), 1: sign(6, "validating", 900)}, 60) == ""
    ), "no rank is behind"
    assert (
        find_stragglers({0: sign(7, "in forward", 1), 1: sign(6, "in backward", 90)}, 60) == ""
    ), "no rank waits yet"


def test_errors_caused_by_other_ranks_are_recognised() -> None:
    assert is_consequence(
        RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4321")
    )
    assert is_consequence(torch.distributed.DistBackendError("NCCL error: remote process exited"))
    assert not is_consequence(
        RuntimeError("The size of tensor a (4) must match the size of tensor b (3)")
    )
    assert not is_consequence(ValueError("closed by peer"))
