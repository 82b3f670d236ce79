"""The average of the weights against the sum that its definition gives."""

import numpy as np
import pytest
import torch
from torch import nn

from liverseg_dist.training.ema import Ema


class OneWeight(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], dtype=torch.float64))

    def set(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_average_is_the_weighted_sum_of_all_weights(decay: float) -> None:
    values = np.random.default_rng(0).normal(size=40)
    model = OneWeight(values[0])
    ema = Ema(model, decay)
    shares = np.zeros(len(values))
    shares[0] = 1.0
    for step, value in enumerate(values[1:]):
        model.set(value)
        ema.update(model, step)
        kept = min(decay, (1 + step) / (10 + step))
        shares *= kept
        shares[step + 1] = 1 - kept
    assert shares.sum() == pytest.approx(1)
    expected = float(shares @ values)
    assert float(ema.shadow["weight"]) == pytest.approx(expected, rel=1e-12)
    assert ema.weights()["weight"].dtype == torch.float32
    assert float(ema.weights()["weight"]) == pytest.approx(expected, rel=1e-6)


def test_early_steps_forget_the_initial_weights() -> None:
    """With a constant decay of 0.999 the initial weight would still have a share of 0.9."""
    model = OneWeight(1000.0)
    ema = Ema(model, 0.999)
    model.set(0.0)
    for step in range(100):
        ema.update(model, step)
    assert float(ema.shadow["weight"]) < 1e-6 * 1000


def test_state_of_a_checkpoint_is_loaded_in_place() -> None:
    model = OneWeight(1.0)
    ema = Ema(model, 0.9)
    (tensor,) = ema.state().values()
    tensor.fill_(5.0)
    assert list(ema.state()) == ["ema.weight"]
    assert float(ema.weights()["weight"]) == 5.0
    assert float(model.weight.detach()) == 1.0, "the average is no view of the weights"


def test_without_a_decay_nothing_is_kept() -> None:
    model = OneWeight(1.0)
    ema = Ema(model, 0.0)
    ema.update(model, 0)
    assert ema.state() == {}
    assert ema.weights() == {}
