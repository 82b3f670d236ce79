"""DDP, FSDP2 and DeepSpeed against a single-process loop, with real processes and checkpoints."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from liverseg_dist.config import load_settings
from liverseg_dist.distributed.strategies.parallelize import check_strategy
from liverseg_dist.errors import UserError
from tests.distributed.launch import torchrun
from tests.distributed.strategy_job import BATCH, Net

JOB = str(Path(__file__).with_name("strategy_job.py"))
ZERO_SPELLS = ["train.strategy=deepspeed"]

pytestmark = pytest.mark.distributed


def job(ranks: int, folder: Path, mode: str, *overrides: str) -> dict:
    done = torchrun(ranks, JOB, str(folder), mode, *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@cache
def plain_loop(optimizer: str) -> tuple[list[float], np.ndarray]:
    """The reference: the complete batch at once, without strategy and trainer."""
    torch.manual_seed(0)
    net = Net()
    made = (
        torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5)
        if optimizer == "sgd"
        else torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=3e-5)
    )
    losses = []
    for step in range(6):
        seeds = range(step * BATCH, (step + 1) * BATCH)
        x = torch.cat(
            [torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(n)) for n in seeds]
        )
        loss = ((net(x) - x) ** 2).mean()
        made.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 12.0)
        made.step()
        losses += [float(loss.detach()), float(norm)]
    weights = dict(net.named_parameters())
    return losses, torch.cat([weights[name].detach().flatten() for name in sorted(weights)]).numpy()


STRATEGIES = {
    "single": (1, "sgd", []),
    "ddp": (2, "sgd", []),
    "ddp 4 ranks": (4, "adamw", []),
    "fsdp": (2, "sgd", ["train.strategy=fsdp"]),
    "fsdp 4 ranks": (4, "adamw", ["train.strategy=fsdp"]),
    "fsdp in two groups": (4, "adamw", ["train.strategy=fsdp", "train.fsdp_shard_ranks=2"]),
    "zero 0": (2, "sgd", [*ZERO_SPELLS, "train.zero_stage=0"]),
    "zero 2 alone": (1, "adamw", [*ZERO_SPELLS, "train.zero_stage=2"]),
    "zero 1": (2, "adamw", [*ZERO_SPELLS, "train.zero_stage=1"]),
    "zero 2": (2, "sgd", [*ZERO_SPELLS, "train.zero_stage=2"]),
    "zero 3": (2, "adamw", [*ZERO_SPELLS, "train.zero_stage=3"]),
}
RESUME_RANKS = {
    "single": 2,
    "ddp": 1,
    "ddp 4 ranks": 2,
    "fsdp": 1,
    "fsdp 4 ranks": 2,
    "fsdp in two groups": 2,
    "zero 1": 4,
    "zero 3": 1,
}
"""Another number of ranks on which the run is resumed."""


LONG_STRATEGIES = ("ddp 4 ranks", "fsdp in two groups", "zero 0", "zero 2 alone")
"""Variants of others that run always."""


def mark_long(name: str) -> object:
    return pytest.param(name, marks=pytest.mark.long) if name in LONG_STRATEGIES else name


@pytest.mark.parametrize("name", [mark_long(name) for name in STRATEGIES])
def test_strategy_equals_the_plain_loop_and_resumes_exactly(name: str, tmp_path: Path) -> None:
    ranks, optimizer, overrides = STRATEGIES[name]
    overrides = [*overrides, f"train.optimizer={optimizer}"]
    uninterrupted = job(ranks, tmp_path, "fresh", *overrides)
    losses, weights = plain_loop(optimizer)
    np.testing.assert_allclose(uninterrupted["losses"], losses, rtol=1e-4)
    np.testing.assert_allclose(uninterrupted["weights"], weights, rtol=1e-3, atol=1e-5)

    resumed = job(ranks, tmp_path, "resume", *overrides)
    assert resumed["losses"] == uninterrupted["losses"][6:]
    assert resumed["weights"] == uninterrupted["weights"]
    if name in RESUME_RANKS:
        other_ranks = job(RESUME_RANKS[name], tmp_path, "resume", *overrides)
        np.testing.assert_allclose(other_ranks["losses"], losses[6:], rtol=1e-4)
        np.testing.assert_allclose(other_ranks["weights"], weights, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed"])
def test_low_precision_reaches_the_network(strategy: str, tmp_path: Path) -> None:
    result = job(2, tmp_path, "dtype", f"train.strategy={strategy}", "train.precision=bf16")
    assert result["dtype"] == "torch.bfloat16"


def test_deterministic_reduction_gives_the_same_bits_on_any_number_of_ranks(tmp_path: Path) -> None:
    override = "train.deterministic_reduction=true"
    results = [
        job(ranks, tmp_path / str(ranks), "fresh", override)["weights"] for ranks in (1, 2, 3)
    ]
    assert results[0] == results[1] == results[2]
    assert job(2, tmp_path / "3", "resume", override)["weights"] == results[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.global_batch_size=1"], "without a sample"),
        (["train.strategy=fsdp", "train.global_batch_size=3"], "multiple of 2 ranks"),
        (["train.strategy=fsdp", "train.channels_last=true"], "strategy ddp only"),
        (["train.strategy=deepspeed", "train.channels_last=true"], "strategy ddp only"),
        (["train.strategy=fsdp", "train.precision=fp16"], "strategy ddp only"),
        (["train.strategy=fsdp", "train.deterministic_reduction=true"], "needs train.strategy=ddp"),
        (["train.fsdp_shard_ranks=2"], "needs train.strategy=fsdp"),
        (["train.strategy=fsdp", "train.compile=true"], "zero_stage=3 shards the same state"),
        (["train.precision=tf32"], "NVIDIA GPU"),
        (
            ["train.strategy=deepspeed", "train.zero_stage=3", "train.ema_decay=0.9"],
            "use zero_stage 2",
        ),
        (
            [
                "train.strategy=deepspeed",
                "train.zero_stage=2",
                "train.offload_optimizer=true",
                "train.on_nonfinite=skip",
            ],
            "zero_stage 1 or 3",
        ),
        (["train.offload_optimizer=true"], "needs train.strategy=deepspeed"),
    ],
)
def test_unsupported_combinations_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_strategy(load_settings([], overrides).train, 2, torch.device("cpu"))


def test_ranks_that_do_not_fill_shard_groups_are_refused() -> None:
    train = load_settings(
        [], ["train.strategy=fsdp", "train.fsdp_shard_ranks=2", "train.global_batch_size=6"]
    ).train
    check_strategy(train, 6, torch.device("cpu"))
    check_strategy(train, 1, torch.device("cpu"))  # fewer than a group: one group
    with pytest.raises(UserError, match="3 ranks cannot be divided"):
        check_strategy(train, 3, torch.device("cpu"))


def test_checkpoint_resumes_under_another_strategy(tmp_path: Path) -> None:
    job(2, tmp_path, "fresh", "train.strategy=fsdp")
    _, weights = plain_loop("sgd")
    resumed = job(2, tmp_path, "resume", "train.strategy=deepspeed", "train.zero_stage=2")
    np.testing.assert_allclose(resumed["weights"], weights, rtol=1e-3, atol=1e-5)
