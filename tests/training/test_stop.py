"""Ctrl-C and the hang-up of a terminal: one line, exit code 75, a status that is true. Real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from liverseg_dist.distributed.torchrun_agent import starts_liverseg
from liverseg_dist.errors import EXIT_RESUMABLE
from liverseg_dist.training.preemption import describe_loss
from tests.distributed.launch import clean_environment, torchrun_command
from tests.training.test_resume import arguments, wait_for_step

pytestmark = pytest.mark.distributed

ENDLESS = ("train.max_steps=100000", "validation.every_steps=0", "checkpoint.every_steps=1000")
STANDALONE = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def start(*command: str, ignored: signal.Signals | None = None) -> subprocess.Popen[str]:
    def begin() -> None:
        # A shell starts background jobs with Ctrl-C ignored, nohup with SIGHUP ignored.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        if ignored:
            signal.signal(ignored, signal.SIG_IGN)

    return subprocess.Popen(
        command,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=begin,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    try:
        out, err = process.communicate(timeout=100)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, out, err


def status(run: Path) -> dict[str, object]:
    return dict(json.loads((run / "status.json").read_text()))


@pytest.mark.parametrize(
    "launcher", [torchrun_command(2), STANDALONE], ids=["liverseg", "standalone"]
)
def test_ctrl_c_under_torchrun_saves_and_ends_with_one_line(
    launcher: list[str], phantom_store: Path, tmp_path: Path
) -> None:
    process = start(*launcher, *arguments(phantom_store, tmp_path / "run", *ENDLESS))
    wait_for_step(tmp_path / "run", 2, process)
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = ended(process)
    assert code == EXIT_RESUMABLE, err
    assert "by SIGINT; all is saved, the same line continues" in out.splitlines()[-1]
    assert [line for line in err.splitlines() if not line.startswith(("warning: ", "train "))] == []
    found = status(tmp_path / "run")
    assert found["state"] == "stopped"
    assert (tmp_path / "run" / "checkpoints" / f"step_{found['step']}").is_dir()


@pytest.mark.parametrize(
    "launcher", [(sys.executable,), torchrun_command(2)], ids=["alone", "torchrun"]
)
def test_a_second_ctrl_c_ends_at_once_and_reports_lost_steps(
    launcher: list[str], phantom_store: Path, tmp_path: Path
) -> None:
    # One micro-batch of several seconds: a stop is honoured between two of them.
    slow = ("train.global_batch_size=48", "train.micro_batch_size=48", "data.patch_size=[32,64,64]")
    process = start(*launcher, *arguments(phantom_store, tmp_path / "run", *ENDLESS, *slow))
    while not list((tmp_path / "run").glob("events.*")):  # the last file before the first step
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.8)
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = ended(process)
    assert code == EXIT_RESUMABLE, err
    assert "all is saved" not in out, "the step was over before the second Ctrl-C"
    line = "ended at once by a second Ctrl-C: no complete step is lost"
    assert f"liverseg: {line}; the same line continues" in err.splitlines()
    assert "Traceback" not in err
    assert status(tmp_path / "run") | {"message": line, "state": "stopped", "step": 0} == status(
        tmp_path / "run"
    )


@pytest.mark.parametrize(
    ("saved", "step", "lost"),
    [
        (0, 0, "no complete step is lost"),
        (20, 20, "no complete step is lost"),
        (0, 1, "step 1 is lost, there is no checkpoint yet"),
        (0, 7, "steps 1 to 7 are lost, there is no checkpoint yet"),
        (20, 21, "step 21 is lost, the newest checkpoint is of step 20"),
        (20, 33, "steps 21 to 33 are lost, the newest checkpoint is of step 20"),
    ],
)
def test_description_of_lost_steps(saved: int, step: int, lost: str) -> None:
    assert describe_loss(saved, step) == lost


def test_a_hang_up_requests_a_stop_except_under_nohup(phantom_store: Path, tmp_path: Path) -> None:
    words = (sys.executable, *arguments(phantom_store, tmp_path / "run", *ENDLESS))
    process = start(*words)
    wait_for_step(tmp_path / "run", 2, process)
    os.killpg(process.pid, signal.SIGHUP)
    code, out, _ = ended(process)
    assert (code, "by SIGHUP; all is saved" in out) == (EXIT_RESUMABLE, True)
    step = int(str(status(tmp_path / "run")["step"]))
    process = start(*words, ignored=signal.SIGHUP)
    wait_for_step(tmp_path / "run", step + 1, process)
    os.killpg(process.pid, signal.SIGHUP)
    wait_for_step(tmp_path / "run", step + 4, process)
    os.killpg(process.pid, signal.SIGINT)
    assert ended(process)[0] == EXIT_RESUMABLE


@pytest.mark.parametrize("after_s", [0.3, 1.0, 2.5])
def test_an_early_ctrl_c_gives_no_traceback(
    after_s: float, phantom_store: Path, tmp_path: Path
) -> None:
    process = start(sys.executable, *arguments(phantom_store, tmp_path / "run", *ENDLESS))
    time.sleep(after_s)
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = ended(process)
    assert (code, err) == (
        EXIT_RESUMABLE,
        "liverseg: interrupted; run the same line again to continue\n",
    )


@pytest.mark.parametrize(
    ("line", "is_ours"),
    [
        ("/venv/bin/torchrun --standalone -m liverseg_dist train", True),
        ("/x/torch/distributed/run.py -m --nproc-per-node=2 liverseg_dist train", True),
        ("/venv/bin/torchrun --nnodes 2 --no-python /venv/bin/liverseg train", True),
        ("/venv/bin/torchrun train.py -m liverseg_dist", False),
        ("/venv/bin/torchrun -m other.train --model liverseg_dist", False),
        ("/venv/bin/torchrun --log-dir liverseg train.py", False),
        ("-m liverseg_dist train", False),
        ("/x/liverseg_dist/__main__.py train", False),
    ],
)
def test_torchrun_of_other_projects_is_not_changed(line: str, is_ours: bool) -> None:
    assert starts_liverseg(line.split()) == is_ours
