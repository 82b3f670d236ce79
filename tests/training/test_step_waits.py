"""A step does not read what the device computes, and makes one collective call of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from liverseg_dist.config import Settings, load_settings
from liverseg_dist.data.loading.device_batches import DeviceBatch
from liverseg_dist.distributed.strategies.ddp import DataParallel
from liverseg_dist.errors import RunFailed
from liverseg_dist.model.losses import build_loss
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.training.step import Stepper

STEPS = 4
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier", "reduce")


class FixedBatches:
    """Batches of two samples; those of step `bad_step` have infinite values."""

    wait_s = 0.0

    def __init__(self, bad_step: int = -1) -> None:
        self._bad_step, self._number = bad_step, -1

    def __next__(self) -> DeviceBatch:
        self._number += 1
        made = torch.Generator().manual_seed(self._number)
        image = torch.randn(1, 1, 8, 8, 8, generator=made)
        label = torch.randint(0, 3, (1, 8, 8, 8), generator=made, dtype=torch.uint8)
        if self._number // 2 == self._bad_step:
            image.fill_(float("inf"))
        return DeviceBatch([self._number], [f"case_{self._number}"], image, label, None)

    def begin_next(self) -> None:
        """Nothing to launch ahead."""


class CountReads(TorchDispatchMode):
    """Counts operations that give a value of a tensor to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # `.item()`, `float()`, `bool()` and `int()` all end here.
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def make_stepper(*overrides: str) -> Stepper:
    torch.manual_seed(0)
    settings: Settings = load_settings(
        [], ["train.global_batch_size=2", "train.micro_batch_size=1", *overrides]
    )
    net = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 3, 1))
    # SGD: AdamW reads step counters, which are on the CPU for every device.
    strategy = DataParallel(net, torch.optim.SGD(net.parameters(), lr=0.1), 1.0, "fp32")
    loss = build_loss(settings.loss, OutputChannels())
    return Stepper(settings, strategy, loss, lambda *_: None, lambda _: None, lambda _: 0.1)


@contextmanager
def count_host_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collects the names of methods that copy a tensor to the host."""
    found: list[str] = []
    with monkeypatch.context() as patched:
        for name in ("cpu", "numpy", "tolist"):
            original = getattr(Tensor, name)

            def record(self: Tensor, *args: Any, _name: str = name, _call: Any = original) -> Any:
                found.append(_name)
                return _call(self, *args)

            patched.setattr(Tensor, name, record)
        yield found


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_step_reads_the_figures_of_the_step_before_only(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper, batches = make_stepper(f"train.on_nonfinite={policy}"), FixedBatches()
    with count_host_reads(monkeypatch) as copies, CountReads() as reads:
        assert stepper.run(0, batches, lambda: False) is None
        assert (copies, reads.count) == ([], 0), "the first step has nothing to read"
        for step in range(1, STEPS):
            copies.clear()
            result = stepper.run(step, batches, lambda: False)
            assert result is not None
            assert result.step == step
            # One list of all figures, and the Dice of the patches from it.
            assert copies == ["tolist"]
            reads_of_dice = len(stepper.outputs.labels.structure_names)
            assert reads.count == step * reads_of_dice
    last = stepper.finish()
    assert last is not None
    assert last.step == STEPS
    assert stepper.finish() is None


def test_a_step_makes_one_collective_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        stepper, batches = make_stepper(), FixedBatches()
        for name in COLLECTIVES:
            original = getattr(dist, name)

            def record(*args: Any, _name: str = name, _call: Any = original, **kwargs: Any) -> Any:
                calls.append(_name)
                return _call(*args, **kwargs)

            monkeypatch.setattr(dist, name, record)
        for step in range(STEPS):
            stepper.run(step, batches, lambda: False)
        stepper.finish()
    finally:
        dist.destroy_process_group()
    assert calls == ["all_reduce"] * STEPS


def test_a_vote_for_a_stop_is_read_one_step_later() -> None:
    stepper, batches = make_stepper(), FixedBatches()
    assert stepper.run(0, batches, lambda: True) is None
    result = stepper.run(1, batches, lambda: False)
    assert result is not None
    assert result.stop_votes == 1
    last = stepper.finish()
    assert last is not None
    assert last.stop_votes == 0


def test_a_loss_that_is_not_finite_fails_with_the_samples_of_its_step() -> None:
    stepper, batches = make_stepper(), FixedBatches(bad_step=1)
    for step in (0, 1):
        stepper.run(step, batches, lambda: False)
    with pytest.raises(RunFailed, match=r"step 2: the loss is not finite; samples 2 \(case_2\), 3"):
        stepper.run(2, batches, lambda: False)


def test_the_last_step_is_checked_before_its_weights_are_used() -> None:
    stepper, batches = make_stepper(), FixedBatches(bad_step=1)
    for step in (0, 1):
        stepper.run(step, batches, lambda: False)
    with pytest.raises(RunFailed, match="step 2: the loss is not finite"):
        stepper.finish()


def test_a_skipped_step_leaves_the_weights_as_they_are() -> None:
    stepper, batches = make_stepper("train.on_nonfinite=skip"), FixedBatches(bad_step=1)
    weights = []
    results = []
    for step in range(3):
        results.append(stepper.run(step, batches, lambda: False))
        weights.append([p.detach().clone() for p in stepper.strategy.plain.parameters()])
    assert all(torch.equal(*pair) for pair in zip(weights[0], weights[1], strict=True))
    assert not all(torch.equal(*pair) for pair in zip(weights[1], weights[2], strict=True))
    assert results[2] is not None
    assert results[2].skipped
    assert "case_2" in results[2].warning
