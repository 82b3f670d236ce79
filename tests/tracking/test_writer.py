"""Figures of a run: TensorBoard's own reader gets them back, and a resumed run repeats no step."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from liverseg_dist.tracking.tags import board_tag
from liverseg_dist.tracking.writer import NullWriter, RunWriter, tensorboard_command


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_scalars_are_in_the_events_and_in_the_lines(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    for step in (1, 2, 3):
        writer.scalars(step, {"train/loss": 1 / step})
    writer.close()
    assert read_lines(tmp_path) == [
        {"step": 1, "train/loss": 1.0},
        {"step": 2, "train/loss": 0.5},
        {"step": 3, "train/loss": 1 / 3},
    ]
    entries = read_events(tmp_path).Scalars(board_tag("train/loss"))
    assert [entry.step for entry in entries] == [1, 2, 3]
    assert [entry.value for entry in entries] == pytest.approx([1, 0.5, 1 / 3])


def test_a_picture_is_read_back(tmp_path: Path) -> None:
    rgb = np.zeros((6, 8, 3), dtype=np.uint8)
    rgb[2:4, :, 0] = 255
    writer = RunWriter(tmp_path)
    writer.picture(5, "validation/liver_1", rgb)
    writer.close()
    (image,) = read_events(tmp_path).Images("validation/liver_1")
    assert (image.step, image.width, image.height) == (5, 8, 6)


def test_a_resumed_run_replaces_later_steps(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    for step in range(1, 6):
        writer.scalars(step, {"train/loss": float(step)})
    writer.close()
    # The newest checkpoint was that of step 3: steps 4 and 5 are computed again.
    again = RunWriter(tmp_path, resume_step=3)
    again.scalars(4, {"train/loss": 40.0})
    again.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3, 4]
    assert read_lines(tmp_path)[-1]["train/loss"] == 40.0
    entries = read_events(tmp_path).Scalars(board_tag("train/loss"))
    assert [entry.value for entry in entries] == [1, 2, 3, 40]


def test_a_line_that_was_cut_is_dropped_by_the_next_start(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "train/loss": 1.0}\n[]\n{"train/loss": 2.0}\n{"step": 2, "tr')
    RunWriter(tmp_path, resume_step=2).close()
    assert read_lines(tmp_path) == [{"step": 1, "train/loss": 1.0}]


def test_a_full_disk_is_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = RunWriter(tmp_path)
    # /dev/full accepts no byte, as a full disk does.
    writer._lines.close()
    writer._lines = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", encoding="utf-8")
    for step in (1, 2):
        writer.scalars(step, {"train/loss": 1.0})
    writer.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "figures cannot be written: No space left on device; the run goes on" in lines[0]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    writer = NullWriter()
    writer.scalars(1, {"train/loss": 1.0})
    writer.picture(1, "a", np.zeros((1, 1, 3), dtype=np.uint8))
    writer.text("a", "b")
    writer.hparams(1, {}, {})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_the_command_shows_the_runs_beside_this_one(tmp_path: Path) -> None:
    run = tmp_path / "all runs" / "first"
    run.mkdir(parents=True)
    assert tensorboard_command(run) == f"tensorboard --logdir '{tmp_path / 'all runs'}'"
