"""An update that the device leaves out, against an optimizer that never had the step: equal bits."""

import pytest
import torch
from torch import Tensor, nn

from liverseg_dist.distributed.strategies.conditional_update import update_unless
from liverseg_dist.distributed.strategies.ddp import DataParallel

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "plain sgd": (torch.optim.SGD, {}),
    "adamw": (torch.optim.AdamW, {}),
}
GOOD, BAD = 1.0, float("nan")


def make(kind: str, fused: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    # Frozen: without a gradient and without state.
    net[0].bias.requires_grad_(False)
    cls, options = OPTIMIZERS[kind]
    return net, cls(net.parameters(), lr=0.1, weight_decay=0.01, fused=fused, **options)  # type: ignore[arg-type]


def set_gradients(net: nn.Module, seed: int, factor: float) -> None:
    made = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        gradient = torch.randn(parameter.shape, generator=made) * factor
        parameter.grad = gradient if parameter.requires_grad else None


def state_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    tensors = [p.detach() for p in net.parameters()]
    for parameter in net.parameters():
        state = optimizer.state.get(parameter, {})
        tensors += [state[key] for key in sorted(state) if isinstance(state[key], Tensor)]
    return tensors


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("steps", [(GOOD, BAD, GOOD), (BAD, GOOD, GOOD)], ids=["later", "first"])
def test_a_left_out_update_changes_nothing(
    kind: str, fused: bool, steps: tuple[float, ...]
) -> None:
    net, optimizer = make(kind, fused)
    expected_net, expected_optimizer = make(kind, fused)
    for seed, factor in enumerate(steps):
        set_gradients(net, seed, factor)
        update_unless(optimizer, torch.tensor(factor != factor))
        if factor == GOOD:
            set_gradients(expected_net, seed, factor)
            expected_optimizer.step()
    found, expected = state_of(net, optimizer), state_of(expected_net, expected_optimizer)
    assert len(found) == len(expected)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_fp16_skips_and_scales_as_the_gradient_scaler_does() -> None:
    """With an overflow in the second of four steps; the scale grows after two good ones."""
    results = []
    for uses_strategy in (True, False):
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        strategy = DataParallel(net, optimizer, 0.0, "fp16")
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        strategy.scaler = scaler
        history = []
        for factor in (1.0, float("inf"), 1.0, 1.0):
            loss = (net(torch.ones(1, 3)) * factor).sum()
            if uses_strategy:
                strategy.backward(loss)
                strategy.step(0.1)
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            history.append((scaler.get_scale(), net.weight.detach().tolist()))
        results.append(history)
    assert results[0] == results[1]
    assert [scale for scale, _ in results[0]] == [4.0, 2.0, 2.0, 4.0]


def test_a_loss_that_is_not_finite_keeps_the_scale() -> None:
    net = nn.Linear(3, 2)
    strategy = DataParallel(net, torch.optim.SGD(net.parameters(), lr=0.1), 0.0, "fp16")
    before, scale = net.weight.detach().clone(), strategy.scaler.get_scale()
    strategy.backward((net(torch.ones(1, 3)) * float("nan")).sum())
    strategy.step(0.1, skip_if=torch.tensor(True))
    assert torch.equal(net.weight, before)
    assert strategy.scaler.get_scale() == scale
