"""What a run logs of its steps, read back from its files."""

import json
from pathlib import Path
from typing import Any

import pytest

from liverseg_dist.config import Settings, load_settings
from liverseg_dist.distributed.world import World
from liverseg_dist.planning.memory_fit import resolve_model
from liverseg_dist.training.resume_state import ResumeState, parse_progress
from liverseg_dist.training.run_folder import RunFolder
from liverseg_dist.training.run_log import RunLog
from liverseg_dist.training.step_figures import StepResult
from liverseg_dist.training.validation import ValidationResult


def make_settings(*overrides: str) -> Settings:
    fixed = ("model.features=[4,8]", "data.patch_size=[16,16,16]", "train.max_steps=5")
    settings = load_settings([], [*fixed, "train.global_batch_size=2", *overrides])
    return resolve_model(settings, (1.0, 1.0, 1.0))


def make_result(step: int, **changes: Any) -> StepResult:
    values: dict[str, Any] = {
        "step": step,
        "loss": 1.0 / step,
        "parts": {"dice": 0.5, "pseudo_dice_liver": float("nan")},
        "gradient_norm": 3.0,
        "learning_rate": 0.01,
        "skipped": False,
        "stop_votes": 0,
        "wait_s": 0.1,
        "step_s": 0.5,
    }
    return StepResult(**{**values, **changes})


def log_steps(folder: Path, settings: Settings, results: list[StepResult | None]) -> list[Any]:
    """Log steps as the trainer does; returns the lines of metrics.jsonl."""
    log = RunLog(RunFolder(folder), settings, World(), ResumeState())
    with log, log.show_progress():
        for result in results:
            log.log_step(result)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_logged_step_has_its_metrics_and_speed(tmp_path: Path) -> None:
    settings = make_settings("train.log_every_steps=1")
    lines = log_steps(tmp_path, settings, [make_result(step) for step in (1, 2, 3)])
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["train/loss"] for line in lines] == [1.0, 0.5, 1 / 3]
    assert lines[0]["train/gradient_norm"] == 3.0
    # Two samples in half a second; a fifth of it was waiting for data.
    assert lines[0]["speed/samples_per_s"] == pytest.approx(4.0)
    assert lines[0]["speed/data_wait_share"] == pytest.approx(0.2)


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    """JSON has no NaN, and TensorBoard draws none."""
    settings = make_settings("train.log_every_steps=1")
    (line,) = log_steps(tmp_path, settings, [make_result(1, loss=float("inf"))])
    assert "train/loss" not in line
    assert not [name for name in line if "pseudo_dice_liver" in name]


def test_steps_between_are_not_written_but_the_last_one_is(tmp_path: Path) -> None:
    settings = make_settings("train.log_every_steps=2")
    lines = log_steps(tmp_path, settings, [make_result(step) for step in range(1, 6)])
    assert [line["step"] for line in lines] == [2, 4, 5]


def test_a_step_that_is_not_read_yet_is_nothing_to_log(tmp_path: Path) -> None:
    settings = make_settings("train.log_every_steps=1")
    lines = log_steps(tmp_path, settings, [None, make_result(1), None])
    assert [line["step"] for line in lines] == [1]


def test_speed_is_that_of_the_recent_steps(tmp_path: Path) -> None:
    settings = make_settings("train.log_every_steps=1")
    times = [1.0, 3.0, 2.0]
    results = [make_result(n, step_s=time) for n, time in enumerate(times, start=1)]
    lines = log_steps(tmp_path, settings, list(results))
    assert lines[-1]["speed/step_s_median"] == 2.0
    assert lines[-1]["speed/samples_per_s"] == pytest.approx(2 / 2.0)


def test_a_skipped_step_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = make_settings("train.log_every_steps=1")
    warning = "step 1: the loss is not finite; samples 0 (liver_1); the step is skipped"
    log_steps(tmp_path, settings, [make_result(1, skipped=True, warning=warning)])
    assert warning in caplog.text


def test_a_validation_is_logged_by_structure(tmp_path: Path) -> None:
    log = RunLog(RunFolder(tmp_path), make_settings(), World(), ResumeState())
    result = ValidationResult(
        dice={"liver": 0.9, "tumour": float("nan")},
        dice_global={"liver": 0.8, "tumour": float("nan")},
        score=0.9,
        cases=2,
        pictures={},
    )
    with log:
        log.log_validation(4, result)
    (line,) = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line == {
        "step": 4,
        "validation/score": 0.9,
        "validation/dice_liver": 0.9,
        "validation/dice_global_liver": 0.8,
    }


def test_other_ranks_write_no_file(tmp_path: Path) -> None:
    world = World(global_rank=1, world_size=2)
    log = RunLog(RunFolder(tmp_path), make_settings(), world, ResumeState())
    with log:
        log.log_validation(1, ValidationResult({"liver": 0.9}, {"liver": 0.8}, 0.9, 1, {}))
    assert list(tmp_path.iterdir()) == []


def test_dice_of_few_structures_is_shown_one_by_one() -> None:
    state = ResumeState(last_dice={"liver": 0.91234, "tumour": 0.5}, last_dice_step=40)
    assert state.describe_dice() == "Dice liver 0.912, tumour 0.500 (step 40)"
    assert ResumeState().describe_dice() == ""


def test_dice_of_many_structures_is_summarised() -> None:
    dice = {f"organ {number}": number / 10 for number in range(1, 9)}
    state = ResumeState(last_dice=dice, last_dice_step=3)
    assert state.describe_dice() == (
        "Dice mean 0.450 of 8 structures, lowest organ 1 0.100 (step 3)"
    )


@pytest.mark.parametrize(
    "state",
    [
        {"step": 3},
        {"step": 3, "progress": {"step": 2}},
        {"step": 3, "progress": {"step": 3, "unknown": 1}},
        {"step": 3, "progress": None},
    ],
)
def test_a_checkpoint_of_another_version_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="checkpoint of step 3 cannot be read by this version"):
        parse_progress(state)
