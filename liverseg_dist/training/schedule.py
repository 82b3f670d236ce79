"""The learning rate as a pure function of the step, so that checkpoints need no schedule state."""

import math
from collections.abc import Callable

from liverseg_dist.config import ScheduleConfig, TrainConfig
from liverseg_dist.errors import UserError


def _poly(config: ScheduleConfig, progress: float) -> float:
    """(1 - t/T)^power, as in nnU-Net (https://doi.org/10.1038/s41592-020-01008-z)."""
    return float((1 - progress) ** config.power)


def _cosine(_config: ScheduleConfig, progress: float) -> float:
    """(1 + cos(pi t/T)) / 2, without restarts (https://arxiv.org/abs/1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def _constant(_config: ScheduleConfig, _progress: float) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[ScheduleConfig, float], float]] = {
    "poly": _poly,
    "cosine": _cosine,
    "constant": _constant,
}
"""`train.schedule.name` -> factor of the learning rate for a progress from 0 to 1."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0).

    The rate rises linearly during the warm-up. Then it follows the schedule; t and T (the steps
    done and the steps in total) count from the end of the warm-up.

    Raises:
        UserError: the schedule's name has no implementation.
    """
    schedule = config.schedule
    factor = SCHEDULES.get(schedule.name)
    if factor is None:
        raise UserError(
            f"train.schedule.name={schedule.name} is not available; choose one of "
            f"{', '.join(SCHEDULES)}"
        )
    if step < schedule.warmup_steps:
        return config.learning_rate * (step + 1) / schedule.warmup_steps
    total = max(1, config.max_steps - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / total)
    return config.learning_rate * factor(schedule, progress)
