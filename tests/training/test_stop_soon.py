"""A stop is honoured within one case of a validation, or while a batch is awaited. Real processes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from liverseg_dist.errors import EXIT_RESUMABLE
from tests.distributed.launch import clean_environment, liverseg, torchrun, torchrun_command
from tests.training.test_failures import rank_process
from tests.training.test_resume import arguments, sha256, steps_logged

pytestmark = pytest.mark.distributed
JOB = str(Path(__file__).with_name("slow_job.py"))
CASE_S = 12.0
GRACE_S = 30.0
"""Time between the signal and the end: a case, a checkpoint and slack for a busy machine."""
STEPS = ("train.max_steps=4", "validation.every_steps=2", "validation.max_cases=3")


def wait_for_file(file: Path, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


def stop_when(
    file: Path, command: list[str], ranks: int, variables: dict[str, str]
) -> tuple[int, float]:
    """Start `command` and request a stop when `file` appears.

    Only the last rank gets the signal. Returns exit code and seconds until the end.
    """
    process = subprocess.Popen(command, env=clean_environment(**variables))
    try:
        wait_for_file(file, process)
        begun = time.monotonic()
        target = rank_process(process.pid, ranks - 1) if ranks > 1 else process.pid
        subprocess.run(["kill", f"-{signal.SIGUSR2.value}", str(target)], check=True)
        return process.wait(120), time.monotonic() - begun
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def validations(run: Path) -> list[dict[str, float]]:
    """The logged validations, without the time."""
    found = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "validation/score" in record:
            found.append({k: v for k, v in record.items() if k == "step" or "dice" in k})
    return found


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_stop_interrupts_a_validation_that_is_run_again(
    ranks: int, phantom_store: Path, tmp_path: Path
) -> None:
    run, alone = tmp_path / "run", tmp_path / "alone"
    words = arguments(phantom_store, run, *STEPS)[2:]
    starter = [sys.executable] if ranks == 1 else torchrun_command(ranks)
    command = [*starter, JOB, str(tmp_path), *words]
    # With 2 ranks and 3 cases, rank 0 has two cases and the signalled rank 1 one.
    code, seconds = stop_when(tmp_path / "cases", command, ranks, {"SLOW_CASE_S": str(CASE_S)})
    assert code == EXIT_RESUMABLE if ranks == 1 else code != 0
    assert seconds < GRACE_S, f"all cases take {3 * CASE_S} s"
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("stopped", 2)
    assert validations(run) == [], "the interrupted validation is not recorded"
    for folder in (run, alone):
        words = arguments(phantom_store, folder, *STEPS)
        done = torchrun(ranks, *words) if ranks > 1 else liverseg(*words[2:])
        assert done.returncode == 0, done.stderr[-2000:]
    assert sha256(run) == sha256(alone)
    assert (run / "best.safetensors").read_bytes() == (alone / "best.safetensors").read_bytes()
    assert validations(run) == validations(alone)
    assert [one["step"] for one in validations(run)] == [2, 4]
    assert steps_logged(run) == [1, 2, 3, 4]


def test_a_stop_interrupts_a_process_that_waits_for_data(
    phantom_store: Path, tmp_path: Path
) -> None:
    run, alone = tmp_path / "run", tmp_path / "alone"
    few = ("train.max_steps=4", "validation.every_steps=0")
    words = arguments(phantom_store, run, *few, "data.prefetch=1")[2:]
    command = [sys.executable, JOB, str(tmp_path), *words]
    # TINY has four micro-batches a step: the tenth belongs to the third step.
    code, seconds = stop_when(tmp_path / "hanging", command, 1, {"HANGING_BATCH": "10"})
    assert code == EXIT_RESUMABLE
    assert seconds < GRACE_S, "data.stall_timeout_s is 300 s"
    assert json.loads((run / "status.json").read_text())["step"] == 2
    for folder in (run, alone):
        done = liverseg(*arguments(phantom_store, folder, *few)[2:])
        assert done.returncode == 0, done.stderr[-2000:]
    assert sha256(run) == sha256(alone)
    assert steps_logged(run) == [1, 2, 3, 4]
