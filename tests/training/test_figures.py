"""What a training shows: TensorBoard tags, the status file, the last lines."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from liverseg_dist.evaluation.report.tensorboard import collect_headline_figures
from liverseg_dist.evaluation.summary import aggregate_scores
from liverseg_dist.tracking.tags import board_tag, part_name
from tests.distributed.launch import clean_environment, liverseg
from tests.training.test_resume import arguments

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def run(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A finished run, validated after steps 4 and 6, and what was printed. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    done = liverseg(*arguments(phantom_store, folder, "train.max_steps=6")[2:])
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def test_tensorboard_shows_the_run_by_its_name_and_dice_first(run: tuple[Path, str, str]) -> None:
    folder, printed, _ = run
    assert f"curves: tensorboard --logdir {folder.parent}\n" in printed
    board = EventMultiplexer().AddRunsFromDirectory(str(folder.parent)).Reload()
    assert list(board.Runs()) == ["first"]
    tags = board.Runs()["first"]["scalars"]
    groups = sorted({tag.partition("/")[0] for tag in tags})
    assert groups == ["dice", "loss", "optimizer", "resources", "result", "speed"]
    assert {"dice/validation_liver", "dice/validation_mean", "dice/training_patches_liver"} <= set(
        tags
    )
    assert {"loss/total", "loss/dice", "loss/cross_entropy"} <= set(tags)
    assert not [tag for tag in tags if tag.startswith("dice/") and "loss" in tag]


def test_metrics_keep_the_names_that_programs_read(run: tuple[Path, str, str]) -> None:
    records = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    step = next(record for record in records if "train/loss" in record)
    assert step["train/loss"] == pytest.approx(
        step["loss/dice"] + step["loss/cross_entropy"], rel=0.2
    )
    assert {
        "speed/step_s_median",
        "memory/host_gib",
        "train/pseudo_dice_liver",
        "train/learning_rate",
    } <= step.keys()
    assert "train/dice" not in step
    assert any(
        "validation/score" in record and "validation/dice_liver" in record for record in records
    )


def test_no_tag_is_lost_or_given_twice() -> None:
    names = [
        "train/loss",
        "train/gradient_norm",
        "validation/score",
        "validation/dice_liver",
        "speed/mfu",
    ]
    names += ["validation/dice_global_liver", "train/pseudo_dice_liver", "memory/gpu_gib"]
    names += [part_name(part) for part in ("dice", "ce", "tversky", "focal", "boundary")]
    assert len({board_tag(name) for name in names}) == len(names)


def test_lesion_tags_say_what_counts_as_found() -> None:
    tags = collect_headline_figures(
        aggregate_scores([])
        | {
            "tumour": {
                **dict.fromkeys(aggregate_scores([])["tumour"], 0.5),
                "detection": DETECTION,
            },
            "calibration": {},
        }
    )
    lesions = sorted(tag for tag in tags if "/lesions/" in tag)
    assert lesions == [
        "evaluation/lesions/precision_detected",
        "evaluation/lesions/precision_touched",
        "evaluation/lesions/recall_detected",
        "evaluation/lesions/recall_touched",
    ]


DETECTION = {name: {"precision": 0.5, "recall": 0.5} for name in ("iou_0", "iou_50")}


def test_the_end_shows_dice_and_where_the_weights_are(run: tuple[Path, str, str]) -> None:
    folder, printed, progress = run
    assert re.search(
        r"done: 6 steps; validation Dice liver 0\.\d{3}(, tumour \d\.\d{3})? \(step 6\)", printed
    )
    assert f"weights: {folder / 'model.safetensors'}; " in printed
    assert re.search(
        r"train 6 steps: 6/6, .*  loss \d\.\d{3}  Dice liver 0\.\d{3}.* \(step 4\)", progress
    )


def test_the_status_follows_a_running_training(phantom_store: Path, tmp_path: Path) -> None:
    words = arguments(phantom_store, tmp_path, "train.max_steps=100000", "validation.every_steps=0")
    process = subprocess.Popen(
        [sys.executable, *words],
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    status: dict[str, object] = {}
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None and not status.get("step"):
            time.sleep(0.2)
            if (tmp_path / "status.json").exists():
                status = json.loads((tmp_path / "status.json").read_text())
    finally:
        process.kill()
        process.wait(30)
    assert status["state"] == "running"
    assert isinstance(status["step"], int)
    assert status["step"] > 0
    assert status["max_steps"] == 100000
    assert isinstance(status["saved_step"], int)
    assert status["saved_step"] <= status["step"]
