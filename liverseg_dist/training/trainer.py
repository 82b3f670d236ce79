"""The training loop: batches in, step, log, validate, save, stop.

`Trainer._train` is the loop. All ranks run it alike: what only rank 0 does (files, terminal) is
behind `RunLog`, `Checkpoints` and `World`. A stop is requested by a signal on some rank; the ranks
agree on it one step later, together with the sum of the metrics, or between two cases of a
validation. The interrupted validation is run again when the run is resumed.

After the first step a rank that hangs or is lost ends the run within
`train.collective_timeout_s`. Work that may take longer (validation, saving) is excepted.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch

from liverseg_dist.config import Settings
from liverseg_dist.data.augment import DeviceTransform, build_preset
from liverseg_dist.data.loading import DevicePrefetcher, PatchLoader, PatchSource
from liverseg_dist.distributed.collectives import (
    all_max,
    barrier,
    broadcast_from_rank0,
    world_size,
)
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.process_groups import set_collective_timeout
from liverseg_dist.distributed.rank_zero import share_from_rank0
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import RunFailed
from liverseg_dist.planning.memory_estimate import micro_batch
from liverseg_dist.training.checkpoint import Checkpoints
from liverseg_dist.training.components import TrainingComponents
from liverseg_dist.training.ema import Ema
from liverseg_dist.training.extension import Schedule
from liverseg_dist.training.preemption import StopFlag, StopWhileWaiting, end_at_once
from liverseg_dist.training.resume_state import ResumeState, parse_progress
from liverseg_dist.training.run_folder import RunFolder
from liverseg_dist.training.run_log import RunLog
from liverseg_dist.training.step import Stepper, rank_batches
from liverseg_dist.training.step_figures import StepResult
from liverseg_dist.training.validation import validate_cases

STEPS_PER_CLOCK_CHECK = 10
"""Steps between two checks of `checkpoint.every_minutes`, which need a broadcast."""
CLOSE_LIMIT_S = 10.0
"""After an error, a checkpoint that is being written gets this much time."""
WAITING_FOR_DATA = "waiting for data"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """How the loop ended."""

    progress: ResumeState
    stopped_by: str
    """Name of a signal, `stop_at_step`, or empty if the run is finished."""
    saved: bool = True
    """Whether the last checkpoint is on disk."""


class Trainer:
    """Runs a training from its newest checkpoint to its end or to a stop.

    Args:
        folder: the run's folder.
        parts: model, data, loss and strategy.
        world: this process.
        watch: receives the progress, and has the samples for crash reports.
    """

    def __init__(
        self, folder: RunFolder, parts: TrainingComponents, world: World, watch: HeartbeatMonitor
    ) -> None:
        self.folder, self.parts, self.world, self.watch = folder, parts, world, watch
        self.settings: Settings = parts.settings
        self.ema = Ema(parts.strategy.plain, self.settings.train.ema_decay)
        self.checkpoints = Checkpoints(
            folder.checkpoints, self.settings.checkpoint.keep_last, watch.timeout_s
        )
        self.progress = ResumeState()
        self.schedule = Schedule(self.settings.train)
        self._last_save_s = time.monotonic()
        self._stop = StopFlag()
        """Replaced by `run`."""
        self._is_limited = False
        # No step has this number: nothing has been saved yet.
        self._saved_step = -1

    def resume(self) -> int:
        """Load the newest intact checkpoint, if there is one. A collective call.

        Returns:
            The number of steps that are done.
        """
        self.watch.report_progress(0, "resuming")
        state = self.checkpoints.newest()
        if state is None:
            return 0
        tensors = self._state_tensors()
        self.checkpoints.load(state["step"], tensors)
        # Some strategies keep copies of the tensors and have to update them.
        self.parts.strategy.state_loaded(tensors)
        self.progress = parse_progress(state)
        self._saved_step = self.progress.step
        if self.progress.scaler:
            self.parts.strategy.scaler.load_state_dict(self.progress.scaler)
        return self.progress.step

    def run(self) -> TrainingResult:
        """Train to the end or to a stop. A collective call."""
        self._last_save_s = time.monotonic()
        # Created here and not in the constructor, because `resume` replaces the progress.
        log = RunLog(self.folder, self.settings, self.world, self.progress)
        with StopFlag(self._end_at_once) as stop:
            self._stop = stop
            self.watch.wants_stop = lambda: stop.requested
            try:
                # The reason of a failure is printed before anything is closed.
                with log, self.watch.report_errors():
                    stopped_by = self._train(log)
                    saved = self._finish()
                    if not stopped_by:
                        log.log_result()
            except BaseException:
                self.checkpoints.close(CLOSE_LIMIT_S)
                raise
            self.checkpoints.close()
        return TrainingResult(self.progress, stopped_by, saved)

    def _train(self, log: RunLog) -> str:
        """Run the training loop. Returns what stopped it; empty when the run is finished."""
        first, last = self.progress.step, self._last_step()
        if self.progress.pending_validation and self._validate_or_defer(log, is_stopping=False):
            return self._name_of_stop()
        stepper = self._build_stepper()
        if first < last:
            self._warm_up()
        with (
            self._open_batches(first, last) as batches,
            log.show_progress(),
            self.watch.report_errors(),
        ):
            for step in range(first, last):
                log.begin_step(step + 1)
                try:
                    before = self._train_one_step(step, stepper, batches)
                except StopWhileWaiting:
                    log.log_step(stepper.finish())
                    return self._name_of_stop()
                log.log_step(before)
                # Compilation and allocation are over.
                if step == first:
                    self._limit_waits()
                is_stopping = _has_stop_votes(before) or self._stops_alone()
                validates, saves = self._validation_is_due(step + 1), self._save_is_due(step + 1)
                if is_stopping or validates or saves or step + 1 == last:
                    # Weights leave the loop only if the step that made them was a good one.
                    result = stepper.finish()
                    log.log_step(result)
                    is_stopping = is_stopping or _has_stop_votes(result)
                if validates:
                    is_stopping = self._validate_or_defer(log, is_stopping)
                # A stop ends the loop, and `_finish` saves.
                if not is_stopping and saves:
                    self._save()
                log.end_step(step + 1)
                if is_stopping:
                    return self._name_of_stop()
        return "" if self.progress.step >= self.settings.train.max_steps else "stop_at_step"

    def _name_of_stop(self) -> str:
        return broadcast_from_rank0(self._stop.signal_name) or "a signal on another rank"

    def _stops_alone(self) -> bool:
        """Whether a stop is requested and there are no other ranks to agree with."""
        return self._stop.requested and not self.world.is_distributed

    def _stop_is_requested(self) -> bool:
        """Whether a stop is requested on a rank, as far as this rank knows."""
        return self._stop.requested or self.watch.other_rank_stops

    def _limit_waits(self) -> None:
        """From now on, a rank that hangs or is lost ends the run soon."""
        self._is_limited = True
        limit_s = min(self.settings.train.collective_timeout_s, self.watch.timeout_s)
        set_collective_timeout(limit_s)
        self.watch.limit_steps(limit_s)

    def _lift_limit(self) -> None:
        """Let ranks wait for each other as long as at the start of the run."""
        self._is_limited = False
        set_collective_timeout(self.watch.timeout_s)
        self.watch.limit_steps(None)

    @contextmanager
    def _long_waits(self) -> Iterator[None]:
        """Surround work whose duration differs between ranks. All ranks leave it together."""
        was_limited = self._is_limited
        self._lift_limit()
        yield
        barrier()
        if was_limited:
            self._limit_waits()

    def _last_step(self) -> int:
        train = self.settings.train
        return min(train.max_steps, train.stop_at_step or train.max_steps)

    def _build_stepper(self) -> Stepper:
        return Stepper(
            self.settings,
            self.parts.strategy,
            self.parts.loss,
            self._report_progress,
            self._set_current_samples,
            self.schedule.rate,
        )

    def _warm_up(self) -> None:
        """Run the strategy once on zeros, which allocates its memory and compiles the model."""
        train, patch_size = self.settings.train, self.settings.data.patch_size
        channels = len(self.settings.data.image_channels)
        shape = (micro_batch(train, world_size()), channels, *patch_size)
        self.parts.strategy.warm_up(torch.zeros(shape, device=self.world.device))

    @contextmanager
    def _open_batches(self, first: int, last: int) -> Iterator[DevicePrefetcher]:
        """Read, augment and copy this rank's micro-batches of steps [first, last)."""
        settings, device = self.settings, self.world.device
        source = PatchSource(
            self.parts.store,
            self.parts.train_ids,
            settings.data,
            settings.seed,
            settings.train.global_batch_size,
        )
        preset = build_preset(settings.data, settings.train.modality_dropout)
        transform = DeviceTransform(preset, settings.data.patch_size)
        loader = PatchLoader(
            source,
            rank_batches(settings, first, last),
            settings.data.workers,
            settings.data.prefetch,
            device.type == "cuda",
            transform.list_tables,
        )
        with loader:
            yield DevicePrefetcher(loader, transform, device)

    def _train_one_step(
        self, step: int, stepper: Stepper, batches: DevicePrefetcher
    ) -> StepResult | None:
        """Launch step `step` (from 0) and update the average of the weights.

        Returns:
            The result of the step before, if it was not read yet.
        """
        result = stepper.run(step, batches, lambda: self._stop.requested)
        self.ema.update(self.parts.strategy.plain, step)
        self.progress.step = step + 1
        return result

    def _report_progress(self, step: int, doing: str) -> None:
        """Report the activity, and let a stop interrupt a single process that waits for data."""
        self.watch.report_progress(step, doing)
        is_waiting = doing == WAITING_FOR_DATA
        self._stop.allow_interruption(is_waiting and not self.world.is_distributed)

    def _set_current_samples(self, samples: Sequence[str]) -> None:
        self.watch.samples = samples

    def _validation_is_due(self, step: int) -> bool:
        every = self.settings.validation.every_steps
        if not every or not self.parts.validation_ids:
            return False
        return step % every == 0 or step == self.settings.train.max_steps

    def _validate_or_defer(self, log: RunLog, is_stopping: bool) -> bool:
        """Validate the present weights. After a stop the next start of the run does it.

        Args:
            is_stopping: whether the ranks have agreed to stop.

        Returns:
            Whether the ranks have agreed to stop.
        """
        was_pending = self.progress.pending_validation
        self.progress.pending_validation = True
        if is_stopping:
            return True
        with self._long_waits():
            is_complete = self._validate(self.progress.step, log)
        self.progress.pending_validation = not is_complete
        if was_pending and is_complete:
            # The checkpoint of this step still requests the validation.
            self._save()
        return bool(all_max(int(self._stop_is_requested())))

    def _validate(self, step: int, log: RunLog) -> bool:
        """Validate the weights after `step` steps, and export them if they are the best.

        Returns:
            Whether the validation is complete; a stop interrupts it between two cases.
        """
        self.watch.report_progress(step - 1, "validating")
        weights = self.weights()
        result = validate_cases(
            self.settings,
            self.parts.store,
            self.parts.validation_ids,
            weights,
            self.world.device,
            self._stop_is_requested,
        )
        if result is None:
            return False
        log.log_validation(step, result)
        # A structure that no case has gives NaN, which is unequal to itself.
        self.progress.last_dice = {k: v for k, v in result.dice.items() if v == v}
        self.progress.last_dice_step = step
        if result.score > self.progress.best_score:
            self.progress.best_score, self.progress.best_step = result.score, step
            if self.settings.checkpoint.keep_best:
                self.world.call_on_rank0(partial(self._export_best, weights))
        return True

    def _export_best(self, weights: dict[str, torch.Tensor]) -> None:
        try:
            self.folder.export(self.folder.best, weights)
        # A full disk may have space again at the end of the run.
        except RunFailed as error:
            _logger.warning("%s", error)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights that are validated and exported. A collective call.

        With EMA these are the averaged weights.
        """
        return self.ema.weights() if self.ema.decay else self.parts.strategy.weights()

    def _save_is_due(self, step: int) -> bool:
        settings = self.settings.checkpoint
        if step % settings.every_steps == 0:
            return True
        # A broadcast in every step would delay the ranks.
        if step % STEPS_PER_CLOCK_CHECK:
            return False
        # The clocks of the ranks differ, so rank 0 decides.
        elapsed_s = time.monotonic() - self._last_save_s
        return bool(broadcast_from_rank0(elapsed_s > settings.every_minutes * 60))

    def _save(self, *, wait: bool = False) -> bool:
        """Write a checkpoint. Returns whether no write is known to have failed."""
        self._last_save_s = time.monotonic()
        self.watch.report_progress(self.progress.step - 1, "saving")
        self.progress.scaler = dict(self.parts.strategy.scaler.state_dict())
        state = {"progress": asdict(self.progress), "world_size": world_size()}
        self._saved_step = self.progress.step
        # It waits for the checkpoint before, which rank 0 finishes last.
        with self._long_waits():
            return self.checkpoints.save(
                self.progress.step, self._state_tensors(), state, wait=wait
            )

    def _state_tensors(self) -> dict[str, torch.Tensor]:
        return {**self.parts.strategy.state(), **self.ema.state()}

    def _finish(self) -> bool:
        """Write the last checkpoint and export the weights.

        Returns:
            Whether the last checkpoint is on disk; rank 0 decides.
        """
        self._lift_limit()
        saved = self.checkpoints.finish()
        # A failed write is tried again, because the disk may have space now.
        is_outdated = not saved or self._saved_step != self.progress.step
        if broadcast_from_rank0(is_outdated):
            saved = self._save(wait=True)
        saved = bool(broadcast_from_rank0(saved))
        weights = self.weights()
        share_from_rank0(partial(self.folder.export, self.folder.model, weights))
        return saved

    def _end_at_once(self) -> None:
        end_at_once(self.folder, self.progress.step, self.settings.train.max_steps)


def _has_stop_votes(result: StepResult | None) -> bool:
    """Whether a stop was requested on some rank in a step. All ranks have the same result."""
    return result is not None and result.stop_votes > 0
