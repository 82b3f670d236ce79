"""The learning rate as a pure function of the step, so that resuming has no schedule state to lose."""

import math

from liverseg_dist.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up, then poly (nnU-Net's), cosine or constant.

    poly: base * (1 - t/T)^power; cosine: base * (1 + cos(pi t/T)) / 2; t and T count from the end of the warm-up.
    """
    schedule = config.schedule
    if step < schedule.warmup_steps:
        return config.learning_rate * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return config.learning_rate
    total = max(1, config.max_steps - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / total)
    if schedule.name == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return float(config.learning_rate * (1 - progress) ** schedule.power)
