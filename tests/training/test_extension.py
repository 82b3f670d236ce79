"""A run whose `train.max_steps` changes: the same bytes as a run that was configured so from that checkpoint on."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from liverseg_dist.config import load_settings
from liverseg_dist.errors import EXIT_DONE, EXIT_USER
from liverseg_dist.training.extension import Schedule, read_horizons
from liverseg_dist.training.schedule import learning_rate
from tests.distributed.launch import liverseg, torchrun
from tests.training.test_resume import arguments, sha256, steps_logged

pytestmark = pytest.mark.distributed
COSINE = ("train.schedule.name=cosine", "validation.every_steps=0", "train.global_batch_size=2")


def train(store: Path, run: Path, max_steps: int, *overrides: str) -> str:
    done = liverseg(*arguments(store, run, *COSINE, f"train.max_steps={max_steps}", *overrides)[2:])
    assert done.returncode == EXIT_DONE, done.stderr
    return done.stdout


def rates(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record["train/learning_rate"] for record in map(json.loads, lines)]


@pytest.fixture(scope="module")
def finished(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of four. Read only."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train(phantom_store, run, 4)
    return run


@pytest.fixture(scope="module")
def extended(
    finished: Path, phantom_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The same, extended to eight steps, and what was printed. Read only."""
    run = tmp_path_factory.mktemp("extended") / "run"
    shutil.copytree(finished, run)
    return run, train(phantom_store, run, 8)


def test_a_finished_run_goes_on_with_more_steps(finished: Path, extended: tuple[Path, str]) -> None:
    run, printed = extended
    assert steps_logged(run) == list(range(1, 9))
    assert "train.max_steps changes from 4 to 8 after step 4" in printed
    old, new = (load_settings([folder / "config.yaml"]).train for folder in (finished, run))
    expected = [learning_rate(old, step) for step in range(4)] + [
        learning_rate(new, step) for step in range(4, 8)
    ]
    assert rates(run) == pytest.approx(expected)
    assert f"{expected[3]:.3g} in step 4, {expected[4]:.3g} in step 5" in printed


def test_files_tell_what_happened(finished: Path, extended: tuple[Path, str]) -> None:
    run, _ = extended
    assert load_settings([run / "config.yaml"]).train.max_steps == 8
    assert (run / "config_until_step_4.yaml").read_text() == (finished / "config.yaml").read_text()
    assert (run / "model_step_4.safetensors").read_bytes() == (
        finished / "model.safetensors"
    ).read_bytes()
    assert sha256(run) != sha256(finished)
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["saved_step"], status["max_steps"]) == (
        "finished",
        8,
        8,
        8,
    )
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [(start["step"], start["ranks"], start["threads"]) for start in starts] == [
        (0, 1, [1]),
        (4, 1, [1]),
    ]


def test_it_equals_a_run_configured_so_from_the_checkpoint_on(
    finished: Path, extended: tuple[Path, str], phantom_store: Path, tmp_path: Path
) -> None:
    """The reference has the checkpoint of step 4 and, from its first start on, a configuration of eight steps."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(finished / "checkpoints", run / "checkpoints")
    content = yaml.safe_load((finished / "config.yaml").read_text())
    content["train"]["max_steps"] = 8
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    printed = train(phantom_store, run, 8)
    assert "train.max_steps changes" not in printed
    assert sha256(run) == sha256(extended[0])


def test_a_constant_rate_makes_the_extension_invisible(phantom_store: Path, tmp_path: Path) -> None:
    """Also with an average of the weights, and with two ranks for the second half."""
    constant = (
        "train.schedule.name=constant",
        "train.ema_decay=0.9",
        "train.deterministic_reduction=true",
    )
    train(phantom_store, tmp_path / "whole", 6, *constant)
    train(phantom_store, tmp_path / "parts", 3, *constant)
    words = arguments(phantom_store, tmp_path / "parts", *COSINE, *constant, "train.max_steps=6")
    done = torchrun(2, *words)
    assert done.returncode == EXIT_DONE, done.stderr[-3000:]
    assert sha256(tmp_path / "parts") == sha256(tmp_path / "whole")


def test_a_damaged_checkpoint_does_not_change_the_outcome(
    extended: tuple[Path, str], finished: Path, phantom_store: Path, tmp_path: Path
) -> None:
    """The run falls back to step 2: steps 3 and 4 are repeated with the rates of the first schedule."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    train(phantom_store, run, 8, "train.stop_at_step=5", "checkpoint.every_steps=100")
    for step in (4, 5):
        next((run / "checkpoints" / f"step_{step}").glob("*.safetensors")).write_bytes(b"damaged")
    (run / "checkpoints" / "step_2").mkdir(exist_ok=True)
    shutil.copytree(
        finished / "checkpoints" / "step_2", run / "checkpoints" / "step_2", dirs_exist_ok=True
    )
    assert "continues at step 2 of 8" in train(phantom_store, run, 8)
    assert sha256(run) == sha256(extended[0])


def test_fewer_steps_are_allowed_down_to_the_present_one(
    phantom_store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(phantom_store, run, 8, "train.stop_at_step=4")
    words = arguments(phantom_store, run, *COSINE, "train.max_steps=3")[2:]
    refused = liverseg(*words)
    assert refused.returncode == EXIT_USER
    assert (
        "the run has done 4 steps, more than train.max_steps=3; set at least 4, or choose another run.dir"
        in refused.stderr
    )
    assert "Traceback" not in refused.stderr
    assert load_settings([run / "config.yaml"]).train.max_steps == 8
    assert "changes from 8 to 5 after step 4" in train(phantom_store, run, 5)
    assert steps_logged(run) == [1, 2, 3, 4, 5]
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_every_step_has_the_rate_of_the_schedule_in_force(tmp_path: Path) -> None:
    """Extended at step 4 and at step 6, and once more at step 6 before any further step."""
    for step, max_steps in ((4, 4), (6, 8)):
        settings = load_settings([], [f"train.max_steps={max_steps}"])
        (tmp_path / f"config_until_step_{step}.yaml").write_text(settings.to_yaml())
    config = load_settings([], ["train.max_steps=10"]).train
    schedule = Schedule(config, read_horizons(tmp_path))
    for step in range(10):
        max_steps = 4 if step < 4 else 8 if step < 6 else 10
        expected = learning_rate(config.model_copy(update={"max_steps": max_steps}), step)
        assert schedule.rate(step) == expected
