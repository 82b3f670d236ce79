"""Learning-rate schedules: every name of the settings has an implementation, others are errors."""

import typing

import pytest

from liverseg_dist.config import ScheduleConfig, TrainConfig
from liverseg_dist.errors import UserError
from liverseg_dist.training.schedule import SCHEDULES, learning_rate


def test_every_name_of_the_settings_has_an_implementation() -> None:
    names = typing.get_args(ScheduleConfig.model_fields["name"].annotation)
    assert set(names) == SCHEDULES.keys()


@pytest.mark.parametrize("step", [0, 50], ids=["warm-up", "after the warm-up"])
def test_a_name_without_an_implementation_is_an_error(step: int) -> None:
    # As if the name had been added to the Literal only.
    schedule = ScheduleConfig(warmup_steps=10).model_copy(update={"name": "exponential"})
    config = TrainConfig(max_steps=100).model_copy(update={"schedule": schedule})
    with pytest.raises(UserError, match=r"train\.schedule\.name=exponential is not available"):
        learning_rate(config, step)


@pytest.mark.parametrize(
    ("name", "halfway", "last"),
    [("poly", 0.5**0.9, 0.01**0.9), ("cosine", 0.5, 0.0002467198), ("constant", 1.0, 1.0)],
)
def test_rates_after_a_linear_warm_up(name: str, halfway: float, last: float) -> None:
    schedule = ScheduleConfig.model_validate({"name": name, "warmup_steps": 100})
    config = TrainConfig(max_steps=200, learning_rate=2.0, schedule=schedule)
    assert learning_rate(config, 0) == pytest.approx(0.02)
    assert learning_rate(config, 99) == pytest.approx(2.0)
    assert learning_rate(config, 150) == pytest.approx(2.0 * halfway)
    assert learning_rate(config, 199) == pytest.approx(2.0 * last)
