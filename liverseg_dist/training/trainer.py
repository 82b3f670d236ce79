"""The training loop: batches in, step, log, validate, save, stop.

`Trainer._train` is the loop. All ranks run it alike: what only rank 0 does (files, terminal) is
behind `RunLog`, `Checkpoints` and `World`. A stop is requested by a signal on some rank; the ranks
agree on it at the end of a step, together with the sum of the metrics.
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
from liverseg_dist.distributed.collectives import broadcast_from_rank0, world_size
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.rank_zero import share_from_rank0
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import RunFailed
from liverseg_dist.planning.memory_estimate import micro_batch
from liverseg_dist.training.checkpoint import Checkpoints
from liverseg_dist.training.components import TrainingComponents
from liverseg_dist.training.ema import Ema
from liverseg_dist.training.extension import Schedule
from liverseg_dist.training.preemption import StopFlag, end_at_once
from liverseg_dist.training.resume_state import ResumeState, parse_progress
from liverseg_dist.training.run_folder import RunFolder
from liverseg_dist.training.run_log import RunLog
from liverseg_dist.training.step import Stepper, StepResult, rank_batches
from liverseg_dist.training.validation import ValidationResult, validate_cases

STEPS_PER_CLOCK_CHECK = 10
"""Steps between two checks of `checkpoint.every_minutes`, which need a broadcast."""
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
            try:
                with log:
                    stopped_by = self._train(log, stop)
                    saved = self._finish()
                    if not stopped_by:
                        log.log_result()
            finally:
                # Also after an error: the process cannot exit while the writer's thread runs.
                self.checkpoints.close()
        return TrainingResult(self.progress, stopped_by, saved)

    def _train(self, log: RunLog, stop: StopFlag) -> str:
        """Run the training loop. Returns what stopped it; empty when the run is finished."""
        first, last = self.progress.step, self._last_step()
        stepper = self._build_stepper()
        if first < last:
            self._warm_up()
        with self._open_batches(first, last) as batches, log.show_progress():
            for step in range(first, last):
                log.begin_step(step + 1)
                result = self._train_one_step(step, stepper, batches, stop.requested)
                log.log_step(step + 1, result)
                if self._validation_is_due(step + 1):
                    self._validate(step + 1, log)
                is_stopping = result.stop_votes > 0
                # A stop ends the loop, and `_finish` saves.
                if not is_stopping and self._save_is_due(step + 1):
                    self._save()
                log.end_step(step + 1)
                if is_stopping:
                    return broadcast_from_rank0(stop.signal_name) or "a signal on another rank"
        return "" if self.progress.step >= self.settings.train.max_steps else "stop_at_step"

    def _last_step(self) -> int:
        train = self.settings.train
        return min(train.max_steps, train.stop_at_step or train.max_steps)

    def _build_stepper(self) -> Stepper:
        return Stepper(
            self.settings,
            self.parts.strategy,
            self.parts.loss,
            self.watch.report_progress,
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
        loader = PatchLoader(
            source,
            rank_batches(settings, first, last),
            settings.data.workers,
            settings.data.prefetch,
            device.type == "cuda",
        )
        with loader:
            preset = build_preset(settings.data, settings.train.modality_dropout)
            transform = DeviceTransform(preset, settings.data.patch_size)
            yield DevicePrefetcher(loader, transform, device)

    def _train_one_step(
        self, step: int, stepper: Stepper, batches: DevicePrefetcher, stop_vote: bool
    ) -> StepResult:
        """Run step `step` (from 0) and update the average of the weights."""
        result = stepper.run(step, batches, stop_vote)
        self.ema.update(self.parts.strategy.plain, step)
        self.progress.step = step + 1
        return result

    def _set_current_samples(self, samples: Sequence[str]) -> None:
        self.watch.samples = samples

    def _validation_is_due(self, step: int) -> bool:
        every = self.settings.validation.every_steps
        if not every or not self.parts.validation_ids:
            return False
        return step % every == 0 or step == self.settings.train.max_steps

    def _validate(self, step: int, log: RunLog) -> None:
        """Validate the weights after `step` steps, and export them if they are the best."""
        self.watch.report_progress(step - 1, "validating")
        weights = self.weights()
        result: ValidationResult = validate_cases(
            self.settings,
            self.parts.store,
            self.parts.validation_ids,
            weights,
            self.world.device,
        )
        log.log_validation(step, result)
        # A structure that no case has gives NaN, which is unequal to itself.
        self.progress.last_dice = {k: v for k, v in result.dice.items() if v == v}
        self.progress.last_dice_step = step
        if result.score > self.progress.best_score:
            self.progress.best_score, self.progress.best_step = result.score, step
            if self.settings.checkpoint.keep_best:
                self.world.call_on_rank0(partial(self._export_best, weights))

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
        return self.checkpoints.save(self.progress.step, self._state_tensors(), state, wait=wait)

    def _state_tensors(self) -> dict[str, torch.Tensor]:
        return {**self.parts.strategy.state(), **self.ema.state()}

    def _finish(self) -> bool:
        """Write the last checkpoint and export the weights.

        Returns:
            Whether the last checkpoint is on disk; rank 0 decides.
        """
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
