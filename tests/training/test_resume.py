"""A run that is killed and started again ends with the same bytes as one that was left alone. Real processes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from liverseg_dist.config import load_settings
from liverseg_dist.errors import EXIT_RESUMABLE, EXIT_USER
from liverseg_dist.training.run_folder import check_settings_compatible
from tests.distributed.launch import clean_environment, liverseg, torchrun, torchrun_command

pytestmark = pytest.mark.distributed

TINY = (
    "data.patch_size=[16,32,32]", "data.workers=1", "data.augmentation=light", "model.features=[4,8]",
    "train.global_batch_size=4", "train.optimizer=adamw", "train.learning_rate=1e-3", "train.ema_decay=0.9",
    "train.threads=1", "train.log_every_steps=1", "checkpoint.every_steps=2", "validation.every_steps=4",
    "validation.max_cases=1",
)  # fmt: skip
STEPS = 8


def arguments(store: Path, run: Path, *overrides: str) -> list[str]:
    base = [
        "-m",
        "liverseg_dist",
        "train",
        "--device",
        "cpu",
        f"data.store={store}",
        f"run.dir={run}",
    ]
    return [*base, f"train.max_steps={STEPS}", *TINY, *overrides]


def sha256(run: Path) -> str:
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


def steps_logged(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if "train/loss" in record]


@pytest.fixture(scope="module")
def undisturbed(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = torchrun(2, *arguments(phantom_store, run))
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def test_a_run_writes_all_documented_files(undisturbed: Path) -> None:
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "model.safetensors",
        "best.safetensors",
    ):
        assert (undisturbed / name).is_file(), name
    assert list(undisturbed.glob("events.*"))
    modes = {
        (undisturbed / name).stat().st_mode
        for name in ("config.yaml", "model.safetensors", "best.safetensors")
    }
    assert len(modes) == 1, "settings and weights have the same permissions"
    assert json.loads((undisturbed / "status.json").read_text())["state"] == "finished"
    assert steps_logged(undisturbed) == list(range(1, STEPS + 1))
    assert not [
        p for p in undisturbed.rglob("*") if p.name.endswith((".tmp", ".pt", ".pkl", ".distcp"))
    ]


def test_the_same_settings_give_the_same_bytes(
    undisturbed: Path, phantom_store: Path, tmp_path: Path
) -> None:
    done = torchrun(2, *arguments(phantom_store, tmp_path / "run", "data.workers=0"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert sha256(tmp_path / "run") == sha256(undisturbed)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_a_killed_and_resumed_run_has_the_same_bytes(
    how: str, undisturbed: Path, phantom_store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        torchrun_command(2, *arguments(phantom_store, run)),
        env=clean_environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_step(run, 3, process)
        os.killpg(process.pid, signal.Signals[how])
    finally:
        if how == "SIGKILL":
            process.wait(60)
    process.wait(90)
    assert not (run / "model.safetensors").exists() or how == "SIGTERM"
    again = torchrun(2, *arguments(phantom_store, run))
    assert again.returncode == 0, again.stderr[-3000:]
    assert "continues at step" in again.stdout
    assert steps_logged(run) == list(range(1, STEPS + 1))
    assert sha256(run) == sha256(undisturbed)


def wait_for_step(run: Path, step: int, process: subprocess.Popen, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if (run / "metrics.jsonl").exists() and f'"step": {step},' in (
            run / "metrics.jsonl"
        ).read_text():
            return
        assert process.poll() is None, "the run ended before it could be disturbed"
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in {timeout_s} s")


def test_a_stop_on_request_has_its_own_exit_code(phantom_store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, *arguments(phantom_store, run, "train.max_steps=100000")],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    wait_for_step(run, 2, process)
    process.send_signal(signal.SIGUSR2)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_RESUMABLE, out
    assert "by SIGUSR2; all is saved" in out
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"


@pytest.mark.long  # `test_any_data` compares one rank with two and then three
def test_deterministic_reduction_gives_the_same_bytes_on_any_number_of_ranks(
    phantom_store: Path, tmp_path: Path
) -> None:
    exact = ("train.deterministic_reduction=true", "train.max_steps=4")
    torchrun(2, *arguments(phantom_store, tmp_path / "two", *exact))
    torchrun(1, *arguments(phantom_store, tmp_path / "one", *exact, "train.stop_at_step=2"))
    done = torchrun(3, *arguments(phantom_store, tmp_path / "one", *exact))  # one rank, then three
    assert done.returncode == 0, done.stderr[-3000:]
    assert sha256(tmp_path / "one") == sha256(tmp_path / "two")


def test_a_damaged_newest_checkpoint_is_skipped(
    undisturbed: Path, phantom_store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    liverseg(*arguments(phantom_store, run, "train.stop_at_step=6")[2:])
    newest = max((run / "checkpoints").glob("step_*"), key=lambda p: int(p.name[5:]))
    assert newest.name == "step_6"
    shard = next(newest.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    (run / "checkpoints" / ".step_8.tmp").mkdir()
    again = liverseg(*arguments(phantom_store, run)[2:])
    assert again.returncode == 0, again.stderr
    assert "step_6 is skipped" in again.stderr
    assert "continues at step 4" in again.stdout
    assert not (run / "checkpoints" / ".step_8.tmp").exists()


def test_other_settings_do_not_continue_a_run(undisturbed: Path, phantom_store: Path) -> None:
    done = liverseg(*arguments(phantom_store, undisturbed, "train.learning_rate=0.5")[2:])
    assert done.returncode == EXIT_USER
    assert "this run has train.learning_rate=0.001 (not 0.5)" in done.stderr
    assert f"model.pretrained={undisturbed} starts it from this run's weights" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_remedy_in_the_message_continues_the_run() -> None:
    advised = (
        "train.on_nonfinite=skip",
        "data.on_read_error=skip",
        "data.stall_timeout_s=999",
        "memory.budget_gib=20",
    )
    for override in (*advised, "train.strategy=deepspeed", "train.zero_stage=0"):
        check_settings_compatible(load_settings([]), load_settings([], [override]), Path("run"))


@pytest.mark.parametrize(
    "stage",
    # Without shards, and with all of them; `test_strategies` resumes stages 1 and 2.
    [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long), 3],
)
def test_a_finished_run_started_again_keeps_its_bytes_and_its_checkpoint(
    stage: int, phantom_store: Path, tmp_path: Path
) -> None:
    """Under DeepSpeed, in one process that no launcher has started."""
    run = tmp_path / "run"
    spelled = (
        "train.strategy=deepspeed",
        f"train.zero_stage={stage}",
        "train.ema_decay=0",
        "train.max_steps=2",
    )
    words = arguments(phantom_store, run, *spelled, "validation.every_steps=0")[2:]
    done = liverseg(*words)
    assert done.returncode == 0, done.stderr
    weights, saved = sha256(run), (run / "checkpoints" / "step_2").stat().st_ino
    again = liverseg(*words)
    assert again.returncode == 0, again.stderr
    assert "continues at step 2 of 2" in again.stdout
    assert (sha256(run), (run / "checkpoints" / "step_2").stat().st_ino) == (weights, saved)


def test_the_loss_scale_is_resumed(phantom_store: Path, tmp_path: Path) -> None:
    """fp16: the scaler's state decides which steps are skipped, so a fresh one would end elsewhere."""
    half = ("train.precision=fp16", "validation.every_steps=0", "train.max_steps=6")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert liverseg(*arguments(phantom_store, whole, *half)[2:]).returncode == 0
    assert (
        liverseg(*arguments(phantom_store, parts, *half, "train.stop_at_step=3")[2:]).returncode
        == 0
    )
    state = json.loads((parts / "checkpoints" / "step_3" / "state.json").read_text())["progress"][
        "scaler"
    ]
    assert state["scale"] > 0
    done = liverseg(*arguments(phantom_store, parts, *half)[2:])
    assert done.returncode == 0, done.stderr
    assert sha256(parts) == sha256(whole)
