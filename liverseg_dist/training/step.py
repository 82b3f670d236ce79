"""One optimizer step: forward and backward of micro-batches, metrics over all ranks, update.

The host does not wait for the device within a step. What a step has computed is read after the next
step was launched (`step_figures`), so that on a GPU the queue of kernels never runs empty. What this
changes against reading at once:

- Metrics are logged, and a stop is honoured, one step later. All ranks read the same sums, so they
  stop after the same step.
- `train.on_nonfinite=stop`: the run fails one step later, with the samples of the step that caused
  it. In between the weights are updated with the unusable gradient. They are lost with the process:
  `Stepper.finish` reads the last figures before weights are validated, saved or exported.
- `train.on_nonfinite=skip`: the device itself leaves the update out (`conditional_update`), and the
  warning comes one step later. DeepSpeed's ZeRO stages 1 to 3 are the exception: they decide on the
  host, which waits there.

The weights of a run with finite losses do not depend on it.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from liverseg_dist.config import Settings
from liverseg_dist.data.loading import DeviceBatch, DevicePrefetcher
from liverseg_dist.distributed.collectives import (
    begin_sum,
    current_rank,
    gather_from_ranks,
    world_size,
)
from liverseg_dist.distributed.strategies.base import Strategy
from liverseg_dist.errors import RunFailed
from liverseg_dist.model.losses import BatchOverlaps, SegmentationLoss
from liverseg_dist.model.outputs import OutputChannels
from liverseg_dist.model.training_dice import dice_from_counts, overlap_counts
from liverseg_dist.training.schedule import learning_rate
from liverseg_dist.training.step_figures import (
    MicroBatchFigures,
    StepFigures,
    StepResult,
    add_up,
)

KINDS = ("true", "false_positive", "false_negative")
COUNTS = "count/"
"""Prefix of the names of voxel counts. They are summed over ranks like the parts of the loss, and
give the Dice of the batch's patches."""


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
        loss: SegmentationLoss,
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
        self.micro_batches = _count_micro_batches(settings, current_rank())
        # Rank 0 has most samples.
        self._rounds = _count_micro_batches(settings, 0)
        is_cut = self._rounds > 1 or world_size() > 1
        self._sums_overlaps = is_cut and loss.couples_samples
        self._launched: _LaunchedStep | None = None

    def run(
        self, step: int, batches: DevicePrefetcher, is_stop_requested: Callable[[], bool]
    ) -> StepResult | None:
        """Launch optimizer step `step` (from 0). A collective call.

        Args:
            step: number of the step.
            batches: the rank's micro-batches.
            is_stop_requested: whether a stop is requested on this rank; asked after backward.

        Returns:
            The result of the step before; None in the first call.

        Raises:
            RunFailed: loss or gradient of the step before is not finite, and `train.on_nonfinite`
                is stop.
        """
        started, waited_before = time.perf_counter(), batches.wait_s
        own = self._accumulate_gradients(step, batches)
        self._report_progress(step, "summing figures")
        # One collective call for all metrics and flags: each call costs a round trip.
        figures = StepFigures(own, is_stop_requested())
        rate = self.rate(step)
        norm = self._update(rate, figures)
        figures.begin_copy(norm)
        before, self._launched = self._launched, _LaunchedStep(step, rate, own, figures)
        result = None if before is None else self._read_result(before)
        self._launched.wait_s = batches.wait_s - waited_before
        self._launched.step_s = time.perf_counter() - started
        return result

    def finish(self) -> StepResult | None:
        """Wait for the last step. A collective call.

        Returns:
            Its result; None if it was returned already.

        Raises:
            RunFailed: as `run`.
        """
        before, self._launched = self._launched, None
        return None if before is None else self._read_result(before)

    def _accumulate_gradients(self, step: int, batches: DevicePrefetcher) -> MicroBatchFigures:
        """Run forward and backward of this rank's micro-batches."""
        names: list[str] = []
        vectors, is_finite, samples = [], [], []
        held: list[DeviceBatch] = []
        overlaps = None
        if self._sums_overlaps and self._rounds > 1:
            held = [self._read_batch(step, batches) for _ in range(self.micro_batches)]
            overlaps = self._sum_overlaps(step, held)
        for number in range(self.micro_batches):
            batch = held[number] if held else self._read_batch(step, batches)
            shown = _name_samples(batch)
            self._set_current_samples(shown)
            last = number == self.micro_batches - 1
            metrics = self._forward_backward(step, batch, overlaps, last=last)
            # The GPU is still busy: copy the next batch to it.
            batches.begin_next()
            names = list(metrics)
            vectors.append(torch.stack(list(metrics.values())))
            is_finite.append(torch.isfinite(metrics["loss"]))
            samples.append(shown)
        return MicroBatchFigures(names, add_up(vectors), is_finite, samples)

    def _read_batch(self, step: int, batches: DevicePrefetcher) -> DeviceBatch:
        self._report_progress(step, "waiting for data")
        return next(batches)

    @torch.no_grad()
    def _sum_overlaps(self, step: int, held: Sequence[DeviceBatch]) -> Tensor:
        """Return the sums for batch Dice over all micro-batches and ranks. A collective call.

        The gradient of each micro-batch needs them, so the network's output is computed once more.
        """
        sums = []
        for batch in held:
            self._set_current_samples(_name_samples(batch))
            self._report_progress(step, "in forward")
            outputs = self.strategy.forward(self._to_input(batch), last=False)
            sums.append(self.loss.overlap_sums(outputs, batch.label_BDHW, batch.annotated))
        return _sum_over_ranks(add_up(sums))

    def _to_input(self, batch: DeviceBatch) -> Tensor:
        """Return the images of a micro-batch in the network's memory format."""
        if self.settings.train.channels_last:
            return batch.image_BCDHW.contiguous(memory_format=torch.channels_last_3d)
        return batch.image_BCDHW

    def _forward_backward(
        self, step: int, batch: DeviceBatch, overlaps: Tensor | None, *, last: bool
    ) -> dict[str, Tensor]:
        """Compute the loss of a micro-batch and add its gradients.

        Args:
            step: number of the step.
            batch: the micro-batch.
            overlaps: result of `_sum_overlaps`; None: not needed, or each rank has one micro-batch,
                whose sums are exchanged here.
            last: whether it is the rank's last micro-batch of the step.

        Returns:
            The micro-batch's share of the step's metrics, float64 on the device.
        """
        self._report_progress(step, "in forward")
        outputs = self.strategy.forward(self._to_input(batch), last=last)
        # The last micro-batch may be smaller; the sum of all is the mean over the batch.
        share = len(batch.indices) / self.settings.train.global_batch_size
        if self._sums_overlaps and overlaps is None:
            own = self.loss.overlap_sums(outputs, batch.label_BDHW, batch.annotated)
            overlaps = _sum_over_ranks(own)
        whole = None if overlaps is None else BatchOverlaps(overlaps, share)
        result = self.loss(outputs, batch.label_BDHW, batch.annotated, whole)
        self._report_progress(step, "in backward")
        self.strategy.backward(result.total * share)
        metrics: dict[str, Tensor] = {}
        for name, value in {"loss": result.total, **result.parts}.items():
            metrics[name] = value.detach().double() * share
        counts = overlap_counts(outputs, batch.label_BDHW, self.outputs, batch.annotated)
        names = _count_names(self.outputs.labels.structure_names)
        for name, count in zip(names, counts.flatten(), strict=True):
            metrics[name] = count.double()
        return metrics

    def _update(self, rate: float, figures: StepFigures) -> Tensor:
        """Update the weights, or skip the step. Returns the gradient's norm, on the device."""
        is_nonfinite = None
        if self.settings.train.on_nonfinite == "skip":
            is_nonfinite = figures.is_nonfinite()
        return self.strategy.step(rate, skip_if=is_nonfinite)

    def _read_result(self, launched: "_LaunchedStep") -> StepResult:
        """Wait for the figures of a step that was launched."""
        metrics, nonfinite, stop_votes, norm = launched.figures.read()
        problem, samples = "", []
        if nonfinite > 0:
            problem = "the loss is not finite"
            samples = launched.own.find_nonfinite_samples()
        # With fp16 the scaler itself skips the step and reduces the scale.
        elif not math.isfinite(norm) and not self.strategy.scaler.is_enabled():
            problem, samples = "the gradient is not finite", launched.own.all_samples
        warning = ""
        if problem:
            warning = self._describe_nonfinite(launched, problem, samples, is_loss=nonfinite > 0)
        loss = metrics.pop("loss")
        return StepResult(
            launched.step + 1,
            loss,
            _replace_counts_by_dice(metrics, self.outputs.labels.structure_names),
            norm,
            launched.rate,
            bool(warning),
            stop_votes,
            wait_s=launched.wait_s,
            step_s=launched.step_s,
            warning=warning,
        )

    def _describe_nonfinite(
        self, launched: "_LaunchedStep", problem: str, suspects: list[str], *, is_loss: bool
    ) -> str:
        """Why a step was skipped. A collective call: the samples are those of all ranks.

        Args:
            launched: the step.
            problem: what is not finite.
            suspects: this rank's samples that may have caused it.
            is_loss: whether the loss is not finite, and not only the gradient.

        Raises:
            RunFailed: `train.on_nonfinite` is stop, or the step could not be skipped.
        """
        names: list[str] = []
        for samples in gather_from_ranks(suspects):
            names += samples
        message = f"step {launched.step + 1}: {problem}; samples {', '.join(sorted(names))}"
        can_skip = is_loss or self.strategy.skips_nonfinite
        if self.settings.train.on_nonfinite == "skip" and can_skip:
            return f"{message}; the step is skipped"
        # The report of the failure is about this step, not about the one launched since.
        self._report_progress(launched.step, "reading figures")
        self._set_current_samples(launched.own.all_samples)
        # DeepSpeed with sharded state has updated the weights before it returns the norm.
        remedy = "" if can_skip else "train.zero_stage=0 "
        raise RunFailed(
            f"{message}. Check these cases. To continue from the last checkpoint without such "
            f"steps, run the same line with {remedy}train.on_nonfinite=skip; to start again, "
            "choose another run.dir and a lower train.learning_rate"
        )


@dataclass
class _LaunchedStep:
    """A step whose figures were not read yet."""

    step: int
    rate: float
    own: MicroBatchFigures
    figures: StepFigures
    wait_s: float = 0.0
    step_s: float = 0.0


def _count_micro_batches(settings: Settings, rank: int) -> int:
    """Return the number of micro-batches of a rank in a step."""
    own_samples = len(range(rank, settings.train.global_batch_size, world_size()))
    return math.ceil(own_samples / settings.train.micro_batch_size)


def _name_samples(batch: DeviceBatch) -> list[str]:
    """Name samples by their number in the run and their case."""
    return [f"{n} ({case})" for n, case in zip(batch.indices, batch.case_ids, strict=True)]


def _sum_over_ranks(values: Tensor) -> Tensor:
    work = begin_sum(values)
    if work is not None:
        # On a GPU this makes the stream wait, not the host.
        work.wait()
    return values


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
