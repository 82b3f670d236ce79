"""DDP, FSDP2 and DeepSpeed against a single-process loop, with real processes and checkpoints."""

import json
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from liverseg_dist.config import TrainConfig, load_settings
from liverseg_dist.distributed.strategies.parallelize import check_strategy
from liverseg_dist.errors import UserError
from tests.distributed.launch import torchrun
from tests.distributed.strategy_job import BATCH, END, SAVE_AT, Net, make_sample

JOB = str(Path(__file__).with_name("strategy_job.py"))
ZERO_SPELLS = ["train.strategy=deepspeed"]

pytestmark = pytest.mark.distributed

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
"""Name -> ranks, optimizer, settings."""
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
LOW_PRECISION = ("ddp", "fsdp", "deepspeed")
SAME_BITS = "train.deterministic_reduction=true"
RESUMED_AS_ZERO_2 = [*ZERO_SPELLS, "train.zero_stage=2"]

Task = tuple[str, str, str, list[str]]
"""Name, mode, folder and settings: see `strategy_job`."""


def job(ranks: int, tasks: list[Task]) -> dict[str, dict]:
    done = torchrun(ranks, JOB, json.dumps(tasks))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def list_overrides(name: str) -> list[str]:
    _, optimizer, overrides = STRATEGIES[name]
    return [*overrides, f"train.optimizer={optimizer}"]


class Runs:
    """The runs of all tests of this module: one start of processes for each number of ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._results: dict[tuple[str, int], dict[str, dict] | AssertionError] = {}

    def tasks_of_start(self, ranks: int) -> list[Task]:
        """Runs that begin on this many ranks, and those that the same ranks resume."""
        tasks: list[Task] = []
        for name, (wanted, _, _) in STRATEGIES.items():
            if wanted == ranks:
                folder, overrides = str(self.folder / name), list_overrides(name)
                tasks.append((name, "fresh", folder, overrides))
                tasks.append((f"{name} resumed", "resume", folder, overrides))
        if ranks <= 3:
            tasks.append(("same bits", "fresh", str(self.folder / f"bits {ranks}"), [SAME_BITS]))
        if ranks == 2:
            for strategy in LOW_PRECISION:
                overrides = [f"train.strategy={strategy}", "train.precision=bf16"]
                tasks.append((f"bf16 {strategy}", "dtype", "", overrides))
        return tasks

    def tasks_of_resume(self, ranks: int) -> list[Task]:
        """Runs that began on another number of ranks, or under another strategy."""
        tasks: list[Task] = []
        for name, wanted in RESUME_RANKS.items():
            if wanted == ranks:
                tasks.append((name, "resume", str(self.folder / name), list_overrides(name)))
        if ranks == 2:
            tasks.append(("same bits", "resume", str(self.folder / "bits 3"), [SAME_BITS]))
            tasks.append(("fsdp as zero 2", "resume", str(self.folder / "fsdp"), RESUMED_AS_ZERO_2))
        return tasks

    def started(self, ranks: int) -> dict[str, dict]:
        return self._run_once("start", ranks)

    def resumed(self, ranks: int) -> dict[str, dict]:
        for earlier in (1, 2, 3, 4):
            self.started(earlier)
        return self._run_once("resume", ranks)

    def _run_once(self, kind: str, ranks: int) -> dict[str, dict]:
        if (kind, ranks) not in self._results:
            tasks = self.tasks_of_start if kind == "start" else self.tasks_of_resume
            try:
                self._results[kind, ranks] = job(ranks, tasks(ranks))
            except AssertionError as error:
                # Otherwise each of the tests would start the failing processes again.
                self._results[kind, ranks] = error
        found = self._results[kind, ranks]
        if isinstance(found, AssertionError):
            raise found
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("strategies"))


def build_reference_optimizer(name: str, net: nn.Module) -> torch.optim.Optimizer:
    """The optimizer by torch's own name, with this project's default settings."""
    parameters = net.parameters()
    match name:
        case "sgd":
            return torch.optim.SGD(
                parameters, lr=1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5
            )
        case "adamw":
            return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=3e-5)
    raise ValueError(f"the plain loop has no optimizer {name}")


@cache
def plain_loop(optimizer: str) -> tuple[list[float], np.ndarray]:
    """The reference: the complete batch at once, without strategy and trainer."""
    torch.manual_seed(0)
    net = Net()
    made = build_reference_optimizer(optimizer, net)
    losses = []
    for step in range(END):
        x = torch.cat([make_sample(n) for n in range(step * BATCH, (step + 1) * BATCH)])
        loss = ((net(x) - x) ** 2).mean()
        made.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 12.0)
        made.step()
        losses += [float(loss.detach()), float(norm)]
    weights = dict(net.named_parameters())
    return losses, torch.cat([weights[name].detach().flatten() for name in sorted(weights)]).numpy()


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_equals_the_plain_loop_and_resumes_exactly(name: str, runs: Runs) -> None:
    ranks, optimizer, _ = STRATEGIES[name]
    uninterrupted = runs.started(ranks)[name]
    losses, weights = plain_loop(optimizer)
    np.testing.assert_allclose(uninterrupted["losses"], losses, rtol=1e-4)
    np.testing.assert_allclose(uninterrupted["weights"], weights, rtol=1e-3, atol=1e-5)

    resumed = runs.started(ranks)[f"{name} resumed"]
    assert resumed["losses"] == uninterrupted["losses"][2 * SAVE_AT :]
    assert resumed["weights"] == uninterrupted["weights"]


@pytest.mark.parametrize("name", RESUME_RANKS)
def test_strategy_resumes_on_another_number_of_ranks(name: str, runs: Runs) -> None:
    losses, weights = plain_loop(STRATEGIES[name][1])
    other_ranks = runs.resumed(RESUME_RANKS[name])[name]
    np.testing.assert_allclose(other_ranks["losses"], losses[2 * SAVE_AT :], rtol=1e-4)
    np.testing.assert_allclose(other_ranks["weights"], weights, rtol=1e-3, atol=1e-5)


def test_checkpoint_resumes_under_another_strategy(runs: Runs) -> None:
    _, weights = plain_loop("sgd")
    resumed = runs.resumed(2)["fsdp as zero 2"]
    np.testing.assert_allclose(resumed["weights"], weights, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("strategy", LOW_PRECISION)
def test_low_precision_reaches_the_network(strategy: str, runs: Runs) -> None:
    assert runs.started(2)[f"bf16 {strategy}"]["dtype"] == "torch.bfloat16"


def test_deterministic_reduction_gives_the_same_bits_on_any_number_of_ranks(runs: Runs) -> None:
    results = [runs.started(ranks)["same bits"]["weights"] for ranks in (1, 2, 3)]
    assert results[0] == results[1] == results[2]
    assert runs.resumed(2)["same bits"]["weights"] == results[0]


def test_the_plain_loop_has_every_optimizer_of_the_settings() -> None:
    """A new optimizer needs its own reference; it must not be compared with another one."""
    for name in get_args(TrainConfig.model_fields["optimizer"].annotation):
        losses, _ = plain_loop(name)
        assert len(losses) == 2 * END
    with pytest.raises(ValueError, match="no optimizer lion"):
        plain_loop("lion")


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
