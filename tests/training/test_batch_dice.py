"""`loss.batch_dice` does not depend on how a batch is cut into ranks and micro-batches. Real processes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liverseg_dist.distributed.world import World
from tests.distributed.launch import torchrun
from tests.training.batch_dice_job import take_step

JOB = str(Path(__file__).with_name("batch_dice_job.py"))
WHOLE = ["train.global_batch_size=4", "train.micro_batch_size=4"]
CUT = ["train.global_batch_size=4", "train.micro_batch_size=1"]
PAIRS = ["train.global_batch_size=4", "train.micro_batch_size=2"]
UNEVEN = ["train.global_batch_size=4", "train.micro_batch_size=3"]


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """The step of one process with the whole batch at once."""
    return take_step(World.from_environment("cpu"), WHOLE)


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["dice"] == pytest.approx(expected["dice"], rel=1e-6)
    gradient = np.array(expected["gradient"])
    assert np.linalg.norm(np.array(found["gradient"]) - gradient) <= 1e-6


@pytest.mark.parametrize("overrides", [CUT, PAIRS, UNEVEN], ids=["1", "2", "3"])
def test_micro_batches_of_one_process(overrides: list[str], whole: dict[str, Any]) -> None:
    check(take_step(World.from_environment("cpu"), overrides), whole)


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks(ranks: int, whole: dict[str, Any]) -> None:
    settings = [WHOLE, CUT, [*WHOLE, "train.strategy=fsdp"], [*CUT, "train.strategy=fsdp"]]
    uneven = ["train.global_batch_size=5", "train.micro_batch_size=1"]
    done = torchrun(ranks, JOB, json.dumps([*settings, uneven]))
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("[{"))
    *results, last = json.loads(line)
    for result in results:
        check(result, whole)
    five = ["train.global_batch_size=5", "train.micro_batch_size=5"]
    # Ranks have different numbers of micro-batches.
    check(last, take_step(World.from_environment("cpu"), five))


def test_per_sample_dice_is_another_loss(whole: dict[str, Any]) -> None:
    """As each part alone would give it: the comparison of the other tests can fail."""
    other = take_step(World.from_environment("cpu"), [*WHOLE, "loss.batch_dice=false"])
    difference = np.array(other["gradient"]) - np.array(whole["gradient"])
    assert np.linalg.norm(difference) > 1e-3
