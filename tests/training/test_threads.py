"""The default number of threads: never clearly slower than one, and the same again when a run continues."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from liverseg_dist.config import load_settings
from liverseg_dist.model import build_model
from liverseg_dist.model.topology import resolve_topology
from liverseg_dist.training.run_folder import RunFolder
from liverseg_dist.training.threads import choose_threads, find_fastest
from tests.distributed.launch import liverseg
from tests.training.test_resume import TINY


def scaling(seconds: dict[int, float], asked: list[int]) -> Callable[[int], float]:
    def measure(threads: int) -> float:
        asked.append(threads)
        return seconds[threads]

    return measure


@pytest.mark.parametrize(
    ("seconds", "limit", "expected"),
    [
        ({1: 8.0, 2: 4.1, 4: 2.2, 6: 1.9}, 6, 6),
        ({1: 1.8, 2: 11.0}, 2, 1),  # a busy machine
        ({1: 1.8, 2: 1.75}, 2, 1),  # no clear gain
        ({1: 8.0, 2: 4.1, 4: 4.3, 8: 1.0}, 8, 2),
        ({1: 8.0}, 1, 1),
    ],
)
def test_more_threads_only_where_they_are_faster(
    seconds: dict[int, float], limit: int, expected: int
) -> None:
    assert find_fastest(scaling(seconds, []), limit, budget_s=1000.0) == expected


def test_measuring_ends_with_its_budget() -> None:
    asked: list[int] = []
    assert find_fastest(scaling({1: 40.0, 2: 20.0, 4: 10.0, 8: 5.0}, asked), 8, budget_s=30.0) == 2
    assert asked == [1, 2]


def test_measuring_leaves_model_and_random_state_alone() -> None:
    settings = load_settings([], ["data.patch_size=[16,16,16]", "model.features=[4,8]"])
    model = build_model(resolve_topology(settings.model, settings.data.patch_size, (4.0, 4.0, 4.0)))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    assert choose_threads(model, settings, 2) in (1, 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_threads_of_the_last_start_with_as_many_ranks(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.recorded_threads(0, 1) == 0
    lines = [{"threads": [3, 4]}, {"threads": [2]}, {"threads": "two"}, [], {"threads": [0]}]
    folder.starts.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"threads": [9')
    assert folder.recorded_threads(0, 1) == 2
    assert folder.recorded_threads(1, 2) == 4
    assert folder.recorded_threads(0, 3) == 0


@pytest.mark.distributed
def test_a_run_continues_with_its_number_of_threads(phantom_store: Path, tmp_path: Path) -> None:
    """Two threads sum in another order than one. The second start does not measure: it takes what is recorded."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    settings = [
        word for word in TINY if not word.startswith(("train.threads", "validation.every_steps"))
    ]
    settings += ["train.max_steps=2", "validation.every_steps=0"]
    words = ["train", "--device", "cpu", f"data.store={phantom_store}", *settings]

    def train(run: str, *more: str) -> str:
        # An OMP_NUM_THREADS that is no number is no request.
        done = liverseg(*words, f"run.dir={tmp_path / run}", *more, OMP_NUM_THREADS="")
        assert done.returncode == 0, done.stderr
        return done.stdout

    train("whole", "train.threads=2")
    train("parts", "train.threads=2", "train.stop_at_step=1")
    assert "2 thread(s) each" in train("parts")
    whole, parts = (
        hashlib.sha256((tmp_path / run / "model.safetensors").read_bytes())
        for run in ("whole", "parts")
    )
    assert whole.hexdigest() == parts.hexdigest()
