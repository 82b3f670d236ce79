"""One optimizer step: micro-batches forward and backward, figures summed over ranks, then the update."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from liverseg_dist.config import Settings
from liverseg_dist.data.loading import DeviceBatch, DevicePrefetcher
from liverseg_dist.distributed.collectives import (
    all_sum,
    current_rank,
    gather_from_ranks,
    world_size,
)
from liverseg_dist.distributed.strategies.base import Strategy
from liverseg_dist.errors import RunFailed
from liverseg_dist.model.training_dice import dice_from_counts, overlap_counts
from liverseg_dist.training.schedule import learning_rate

STRUCTURES = ("liver", "tumour")
COUNTED = [
    f"{kind}_{name}" for name in STRUCTURES for kind in ("true", "false_positive", "false_negative")
]
COUNTS = "count/"
"""Before the names of voxel counts, which are summed like the loss's parts and become Dice of the batch's patches."""


@dataclass
class StepResult:
    """Figures of one step, the same on every rank; seconds are this rank's."""

    loss: float
    parts: dict[str, float]
    gradient_norm: float
    learning_rate: float
    skipped: bool
    stop_votes: int
    wait_s: float = 0.0
    step_s: float = 0.0
    warning: str = ""
    """Why the step was skipped, with the samples' names."""


def rank_batches(settings: Settings, first_step: int, last_step: int) -> Iterator[list[int]]:
    """This rank's micro-batches of run-wide sample numbers for steps [first_step, last_step).

    Step t is made of samples [t B, (t+1) B); rank r of W takes those at positions r, r + W, ... of it.
    """
    size, micro = settings.train.global_batch_size, settings.train.micro_batch_size
    for step in range(first_step, last_step):
        mine = list(range(step * size, (step + 1) * size))[current_rank() :: world_size()]
        for start in range(0, len(mine), micro):
            yield mine[start : start + micro]


class Stepper:
    """Runs optimizer steps with a strategy and a loss."""

    def __init__(
        self,
        settings: Settings,
        strategy: Strategy,
        loss: nn.Module,
        mark: Callable[[int, str], None],
        take: Callable[[list[str]], None],
        rate: Callable[[int], float] | None = None,
    ) -> None:
        self.settings = settings
        self.rate = rate or partial(learning_rate, settings.train)
        """Learning rate of a step (from 0)."""
        self.strategy = strategy
        self.loss = loss
        self.regions = settings.model.regions
        self.mark = mark
        """Told what this rank is about to do in which step."""
        self.take = take
        """Told the samples it is about to do it with."""
        mine = len(range(current_rank(), settings.train.global_batch_size, world_size()))
        self.micro_batches = math.ceil(mine / settings.train.micro_batch_size)

    def run(self, step: int, batches: DevicePrefetcher, stop_vote: bool) -> StepResult:
        """Optimizer step `step` (from 0). A collective call."""
        started, waited_before = time.perf_counter(), batches.wait_s
        totals: dict[str, Tensor] = {}
        broken: list[str] = []
        seen: list[str] = []
        for number in range(self.micro_batches):
            self.mark(step, "waiting for data")
            batch = next(batches)
            names = [f"{n} ({case})" for n, case in zip(batch.indices, batch.case_ids, strict=True)]
            self.take(names)
            launched = self._launched(step, batch, last=number == self.micro_batches - 1)
            batches.begin_next()
            parts = {name: value.cpu() for name, value in launched.items()}
            seen += names
            if not torch.isfinite(parts["loss"]):
                broken += names
            for name, value in parts.items():
                totals[name] = totals.get(name, torch.zeros((), dtype=torch.float64)) + value
        self.mark(step, "summing figures")
        figures = all_sum(
            torch.stack([*totals.values(), *_flags(bool(broken), stop_vote)])
        ).tolist()
        values = dict(zip(totals, figures, strict=False))
        nonfinite, stop_votes = figures[-2:]
        rate = self.rate(step)
        norm, warning = self._update(step, rate, broken if nonfinite > 0 else seen, nonfinite > 0)
        loss = values.pop("loss")
        counts = torch.tensor(
            [values.pop(f"{COUNTS}{name}") for name in COUNTED], dtype=torch.float64
        ).view(2, 3)
        values |= {
            f"pseudo_dice_{name}": float(dice)
            for name, dice in zip(STRUCTURES, dice_from_counts(counts), strict=True)
        }
        elapsed, waited = time.perf_counter() - started, batches.wait_s - waited_before
        return StepResult(
            loss, values, norm, rate, bool(warning), int(stop_votes), waited, elapsed, warning
        )

    def _launched(self, step: int, batch: DeviceBatch, *, last: bool) -> dict[str, Tensor]:
        """The batch's part in the step's loss and its parts, on the device: nothing here waits for a GPU."""
        image_BCDHW = batch.image_BCDHW
        if self.settings.train.channels_last:
            image_BCDHW = image_BCDHW.contiguous(memory_format=torch.channels_last_3d)
        self.mark(step, "in forward")
        outputs = self.strategy.forward(image_BCDHW, last=last)
        result = self.loss(outputs, batch.label_BDHW)
        share = len(batch.indices) / self.settings.train.global_batch_size
        self.mark(step, "in backward")
        self.strategy.backward(result.total * share)
        named = {"loss": result.total, **result.parts}
        shared = {name: value.detach().double() * share for name, value in named.items()}
        counts = overlap_counts(outputs, batch.label_BDHW, self.regions)
        return shared | {
            f"{COUNTS}{name}": count for name, count in zip(COUNTED, counts.flatten(), strict=True)
        }

    def _update(
        self, step: int, rate: float, suspects: list[str], nonfinite: bool
    ) -> tuple[float, str]:
        """The gradient norm, and what went wrong. `suspects`: this rank's samples that may be at fault."""
        if nonfinite:
            self.strategy.skip()
            norm, what = float("nan"), "the loss is not finite"
        else:
            norm, what = self.strategy.step(rate), "the gradient is not finite"
            if (
                math.isfinite(norm) or self.strategy.scaler.is_enabled()
            ):  # a scaler skips and tries a smaller scale
                return norm, ""
        names = sorted(name for ours in gather_from_ranks(suspects) for name in ours)
        message = f"step {step + 1}: {what}; samples {', '.join(names)}"
        if self.settings.train.on_nonfinite == "skip" and (
            nonfinite or self.strategy.skips_nonfinite
        ):
            return norm, f"{message}; the step is skipped"
        skips = nonfinite or self.strategy.skips_nonfinite
        remedy = (
            "train.on_nonfinite=skip" if skips else "train.zero_stage=0 train.on_nonfinite=skip"
        )
        raise RunFailed(
            f"{message}. Look at these cases; the same line with {remedy} goes on from the last checkpoint and leaves "
            "such steps out; another run.dir with a lower train.learning_rate begins anew"
        )


def _flags(broken: bool, stop_vote: bool) -> list[Tensor]:
    return [torch.tensor(float(flag), dtype=torch.float64) for flag in (broken, stop_vote)]
