"""One optimizer step: forward and backward of micro-batches, metrics over all ranks, update."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.model.training_dice import dice_from_counts, overlap_counts
from liverseg_dist.training.schedule import learning_rate

KINDS = ("true", "false_positive", "false_negative")
COUNTS = "count/"
"""Prefix of the names of voxel counts. They are summed over ranks like the parts of the loss, and
give the Dice of the batch's patches."""


@dataclass
class StepResult:
    """Metrics of one step, equal on all ranks except for the durations."""

    loss: float
    parts: dict[str, float]
    gradient_norm: float
    learning_rate: float
    skipped: bool
    stop_votes: int
    """Number of ranks on which a stop was requested."""
    wait_s: float = 0.0
    """Seconds that this rank waited for data."""
    step_s: float = 0.0
    warning: str = ""
    """Why the step was skipped, with the names of the samples."""


def rank_batches(settings: Settings, first_step: int, last_step: int) -> Iterator[list[int]]:
    """Yield this rank's micro-batches for steps [first_step, last_step).

    A micro-batch is a list of sample numbers, which count over the run: step t has the samples
    [t B, (t+1) B), and rank r of W takes those at positions r, r + W, ... of them.
    """
    size, micro = settings.train.global_batch_size, settings.train.micro_batch_size
    for step in range(first_step, last_step):
        # The order within a step does not depend on the number of ranks.
        own = list(range(step * size, (step + 1) * size))[current_rank() :: world_size()]
        for start in range(0, len(own), micro):
            yield own[start : start + micro]


class Stepper:
    """Runs optimizer steps with a strategy and a loss.

    Args:
        report_progress: called with the step and the activity before each part of a step.
        set_current_samples: called with the samples of each micro-batch, for error reports.
        rate: learning rate of a step (from 0); the default is the schedule of the settings.
    """

    def __init__(
        self,
        settings: Settings,
        strategy: Strategy,
        loss: nn.Module,
        report_progress: Callable[[int, str], None],
        set_current_samples: Callable[[list[str]], None],
        rate: Callable[[int], float] | None = None,
    ) -> None:
        self.settings = settings
        self.strategy = strategy
        self.loss = loss
        self.outputs = OutputChannels(settings.data.label_scheme, settings.model.regions)
        self.rate = rate or partial(learning_rate, settings.train)
        self._report_progress = report_progress
        self._set_current_samples = set_current_samples
        own_samples = len(range(current_rank(), settings.train.global_batch_size, world_size()))
        self.micro_batches = math.ceil(own_samples / settings.train.micro_batch_size)

    def run(self, step: int, batches: DevicePrefetcher, stop_vote: bool) -> StepResult:
        """Run optimizer step `step` (from 0). A collective call.

        Args:
            stop_vote: whether a stop was requested on this rank.
        """
        started, waited_before = time.perf_counter(), batches.wait_s
        totals, samples, nonfinite_samples = self._accumulate_gradients(step, batches)
        self._report_progress(step, "summing figures")
        flags = _as_tensors(bool(nonfinite_samples), stop_vote)
        # One collective call for all metrics and flags: each call costs a round trip.
        sums = all_sum(torch.stack([*totals.values(), *flags])).tolist()
        # The two flags at the end of the sums have no name.
        metrics = dict(zip(totals, sums, strict=False))
        is_nonfinite, stop_votes = sums[-2] > 0, int(sums[-1])
        rate = self.rate(step)
        suspects = nonfinite_samples if is_nonfinite else samples
        norm, warning = self._update(step, rate, suspects, is_nonfinite)
        loss = metrics.pop("loss")
        return StepResult(
            loss,
            _replace_counts_by_dice(metrics, self.outputs.labels.structure_names),
            norm,
            rate,
            bool(warning),
            stop_votes,
            wait_s=batches.wait_s - waited_before,
            step_s=time.perf_counter() - started,
            warning=warning,
        )

    def _accumulate_gradients(
        self, step: int, batches: DevicePrefetcher
    ) -> tuple[dict[str, Tensor], list[str], list[str]]:
        """Run forward and backward of this rank's micro-batches.

        Returns:
            Sums of the metrics (float64, CPU), names of all samples, and names of the samples in
            micro-batches whose loss is not finite.
        """
        totals: dict[str, Tensor] = {}
        samples: list[str] = []
        nonfinite: list[str] = []
        for number in range(self.micro_batches):
            self._report_progress(step, "waiting for data")
            batch = next(batches)
            names = [f"{n} ({case})" for n, case in zip(batch.indices, batch.case_ids, strict=True)]
            self._set_current_samples(names)
            on_device = self._forward_backward(step, batch, last=number == self.micro_batches - 1)
            # The GPU is still busy: copy the next batch to it before waiting for the results.
            batches.begin_next()
            # This waits for the GPU.
            metrics = {name: value.cpu() for name, value in on_device.items()}
            samples += names
            if not torch.isfinite(metrics["loss"]):
                nonfinite += names
            for name, value in metrics.items():
                totals[name] = totals.get(name, torch.zeros((), dtype=torch.float64)) + value
        return totals, samples, nonfinite

    def _forward_backward(self, step: int, batch: DeviceBatch, *, last: bool) -> dict[str, Tensor]:
        """Compute the loss of a micro-batch and add its gradients.

        Nothing here waits for the GPU.

        Args:
            last: whether it is the rank's last micro-batch of the step.

        Returns:
            The micro-batch's share of the step's metrics, on the device.
        """
        image_BCDHW = batch.image_BCDHW
        if self.settings.train.channels_last:
            image_BCDHW = image_BCDHW.contiguous(memory_format=torch.channels_last_3d)
        self._report_progress(step, "in forward")
        outputs = self.strategy.forward(image_BCDHW, last=last)
        result = self.loss(outputs, batch.label_BDHW, batch.annotated)
        # The last micro-batch may be smaller; the sum of all is the mean over the batch.
        share = len(batch.indices) / self.settings.train.global_batch_size
        self._report_progress(step, "in backward")
        self.strategy.backward(result.total * share)
        metrics: dict[str, Tensor] = {}
        for name, value in {"loss": result.total, **result.parts}.items():
            metrics[name] = value.detach().double() * share
        counts = overlap_counts(outputs, batch.label_BDHW, self.outputs, batch.annotated)
        names = _count_names(self.outputs.labels.structure_names)
        for name, count in zip(names, counts.flatten(), strict=True):
            metrics[name] = count
        return metrics

    def _update(
        self, step: int, rate: float, suspects: list[str], is_nonfinite: bool
    ) -> tuple[float, str]:
        """Update the weights, or skip the step.

        Args:
            suspects: this rank's samples that may have caused a loss or gradient that is not
                finite.
            is_nonfinite: whether the loss is not finite on some rank.

        Returns:
            The gradient's norm, and why the step was skipped (empty if it was not).

        Raises:
            RunFailed: loss or gradient is not finite, and `train.on_nonfinite` is stop.
        """
        if is_nonfinite:
            # The gradients contain NaN and must not be used.
            self.strategy.skip()
            norm, problem = float("nan"), "the loss is not finite"
        else:
            norm, problem = self.strategy.step(rate), "the gradient is not finite"
            # With fp16 the scaler itself skips the step and reduces the scale.
            if math.isfinite(norm) or self.strategy.scaler.is_enabled():
                return norm, ""
        names: list[str] = []
        for samples in gather_from_ranks(suspects):
            names += samples
        message = f"step {step + 1}: {problem}; samples {', '.join(sorted(names))}"
        can_skip = is_nonfinite or self.strategy.skips_nonfinite
        if self.settings.train.on_nonfinite == "skip" and can_skip:
            return norm, f"{message}; the step is skipped"
        # DeepSpeed with sharded state has updated the weights before it returns the norm.
        remedy = "" if can_skip else "train.zero_stage=0 "
        raise RunFailed(
            f"{message}. Check these cases. To continue from the last checkpoint without such "
            f"steps, run the same line with {remedy}train.on_nonfinite=skip; to start again, "
            "choose another run.dir and a lower train.learning_rate"
        )


def _count_names(structures: Sequence[str]) -> list[str]:
    """Names of the voxel counts of each structure, in the order of `overlap_counts`."""
    names = []
    for structure in structures:
        for kind in KINDS:
            names.append(f"{COUNTS}{kind}_{structure}")
    return names


def _replace_counts_by_dice(
    metrics: Mapping[str, float], structures: Sequence[str]
) -> dict[str, float]:
    """Replace the summed voxel counts by the Dice of the batch's patches (`pseudo_dice_*`).

    Dice is NaN for a structure that no sample of the batch has, or has annotated.
    """
    values = dict(metrics)
    counts = [values.pop(name) for name in _count_names(structures)]
    table = torch.tensor(counts, dtype=torch.float64).view(len(structures), len(KINDS))
    for name, dice in zip(structures, dice_from_counts(table), strict=True):
        values[f"pseudo_dice_{name}"] = float(dice)
    return values


def _as_tensors(*flags: bool) -> list[Tensor]:
    return [torch.tensor(float(flag), dtype=torch.float64) for flag in flags]
