"""The training loop: steps, figures, validation, checkpoints, and stopping where all ranks agree to."""

import resource
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from liverseg_dist.config import Settings
from liverseg_dist.data.augment import DeviceTransform, build_preset
from liverseg_dist.data.loading import DevicePrefetcher, PatchLoader, PatchSource
from liverseg_dist.distributed.collectives import broadcast_from_rank0, world_size
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import RunFailed
from liverseg_dist.model.flops import peak_tflops, sample_flops
from liverseg_dist.planning.memory_estimate import micro_batch
from liverseg_dist.tracking.profile import StepProfile
from liverseg_dist.tracking.progress import ProgressLine, show_progress
from liverseg_dist.tracking.tags import part_name
from liverseg_dist.tracking.writer import NullWriter, RunWriter, Writer
from liverseg_dist.training.checkpoint import Checkpoints
from liverseg_dist.training.components import TrainingComponents
from liverseg_dist.training.ema import Ema
from liverseg_dist.training.extension import Schedule
from liverseg_dist.training.hparams import comparable_settings
from liverseg_dist.training.preemption import StopFlag, end_at_once
from liverseg_dist.training.run_folder import RunFolder
from liverseg_dist.training.step import Stepper, StepResult, rank_batches
from liverseg_dist.training.validation import ValidationResult, validate_cases

STATUS_INTERVAL_S = 5.0
"""`status.json` of a running training is at most this old, a step's time apart."""


@dataclass
class ResumeState:
    """What a resumed run must know besides tensors."""

    step: int = 0
    """Optimizer steps done; samples seen are step * global_batch_size."""
    best_score: float = float("-inf")
    best_step: int = 0
    last_dice: dict[str, float] = field(default_factory=dict)
    """Of the last validation, which was after `last_dice_step`."""
    last_dice_step: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)

    def describe_dice(self) -> str:
        """Dice of the last validation with its step; empty before the first."""
        dice = ", ".join(f"{name} {value:.3f}" for name, value in self.last_dice.items())
        if not dice:
            return ""
        return (
            f"Dice {dice} (step {self.last_dice_step})" if self.last_dice_step else f"Dice {dice}"
        )


def parse_progress(state: dict[str, Any]) -> ResumeState:
    """From a checkpoint's state. Raises `RunFailed` for one that another version wrote."""
    try:
        progress = ResumeState(**state["progress"])
        if progress.step != state["step"]:
            raise ValueError(f"step {progress.step}")
    except (KeyError, TypeError, ValueError) as error:
        raise RunFailed(
            f"the checkpoint of step {state['step']} is not understood ({error}); remove it"
        ) from None
    return progress


@dataclass(frozen=True)
class TrainingResult:
    """How the loop ended. `stopped_by`: a signal's name, `stop_at_step`, or empty when the run is finished."""

    progress: ResumeState
    stopped_by: str
    saved: bool = True
    """Whether the last checkpoint is safe on disk."""


class Trainer:
    """A run from its newest checkpoint to its end, or to a stop."""

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
        self._last_status_s = time.monotonic()
        self._saved_step = -1
        self._recent: deque[StepResult] = deque(maxlen=200)
        self._sample_flops = (
            sample_flops(self.settings.model, self.settings.data.patch_size) if world.is_main else 0
        )

    def resume(self) -> int:
        """Load the newest whole checkpoint, if there is one; returns the step the run goes on from."""
        self.watch.mark(0, "resuming")
        state = self.checkpoints.newest()
        if state is None:
            return 0
        tensors = self._tensors()
        self.checkpoints.load(state["step"], tensors)
        self.parts.strategy.state_loaded(tensors)
        self.progress = parse_progress(state)
        self._saved_step = self.progress.step
        if self.progress.scaler:
            self.parts.strategy.scaler.load_state_dict(self.progress.scaler)
        return self.progress.step

    def run(self) -> TrainingResult:
        """Train to the end or to a stop. A collective call."""
        self._last_save_s = time.monotonic()
        writer = self._writer()
        with StopFlag(self._end_at_once) as stop:
            try:
                stopped_by = self._steps(writer, stop)
                saved = self._close()
                if not stopped_by:
                    writer.hparams(
                        self.progress.step, comparable_settings(self.settings), self._results()
                    )
            finally:
                self.checkpoints.close()
                writer.close()
        return TrainingResult(self.progress, stopped_by, saved)

    def _end_at_once(self) -> None:
        end_at_once(
            self.folder,
            self.progress.step,
            self.settings.train.max_steps,
            report=self.world.is_main,
        )

    def _steps(self, writer: Writer, stop: StopFlag) -> str:
        settings, first = self.settings, self.progress.step
        last = min(
            settings.train.max_steps, settings.train.stop_at_step or settings.train.max_steps
        )
        parts, rate = self.parts, self.schedule.rate
        stepper = Stepper(settings, parts.strategy, parts.loss, self.watch.mark, self._take, rate)
        if first < last:
            shape = (micro_batch(settings.train, world_size()), 1, *settings.data.patch_size)
            self.parts.strategy.warm_up(torch.zeros(shape, device=self.world.device))
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
            self.world.device.type == "cuda",
        )
        title = f"train {settings.train.max_steps} steps"
        with (
            loader,
            show_progress(title, settings.train.max_steps, quiet=not self.world.is_main) as line,
        ):
            line.advance(first)
            transform = DeviceTransform(build_preset(settings.data), settings.data.patch_size)
            batches = DevicePrefetcher(loader, transform, self.world.device)
            steps = settings.train.profile_steps if self.world.is_main else None
            profile = StepProfile(
                self.folder.path / "profile", steps, cuda=self.world.device.type == "cuda"
            )
            for step in range(first, last):
                profile.before(step + 1)
                stops = self._one(step, stepper, batches, stop.requested, writer, line)
                profile.after(step + 1)
                if stops:
                    return broadcast_from_rank0(stop.signal_name) or "a signal on another rank"
        return "" if self.progress.step >= settings.train.max_steps else "stop_at_step"

    def _one(
        self,
        step: int,
        stepper: Stepper,
        batches: DevicePrefetcher,
        stop_vote: bool,
        writer: Writer,
        line: ProgressLine,
    ) -> bool:
        """One step and what belongs to its boundary. True when the ranks agree to stop."""
        result = stepper.run(step, batches, stop_vote)
        self.ema.update(self.parts.strategy.plain, step)
        done = self.progress.step = step + 1
        self._recent.append(result)
        if done % self.settings.train.log_every_steps == 0 or done == self.settings.train.max_steps:
            writer.scalars(done, self._figures(result))
        if result.warning and self.world.is_main:
            print(f"warning: {result.warning}", file=sys.stderr, flush=True)
        line.advance(note=self._note(result))
        self._write_status(done)
        every = self.settings.validation.every_steps
        if (
            every
            and self.parts.validation_ids
            and (done % every == 0 or done == self.settings.train.max_steps)
        ):
            self._validate(done, writer)
        if result.stop_votes:
            return True
        if self._save_is_due(done):
            self._save()
        return False

    def _write_status(self, step: int) -> None:
        """Let `status.json` follow the run, at most every `STATUS_INTERVAL_S`."""
        now = time.monotonic()
        if not self.world.is_main or now - self._last_status_s < STATUS_INTERVAL_S:
            return
        self._last_status_s = now
        with suppress(OSError):  # a full disk does not end a run; the next status may fit
            self.folder.set_status("running", step, self.settings.train.max_steps)

    def _take(self, samples: Sequence[str]) -> None:
        self.watch.samples = samples

    def _validate(self, step: int, writer: Writer) -> None:
        self.watch.mark(step - 1, "validating")
        weights = self.weights()
        store, ids = self.parts.store, self.parts.validation_ids
        found: ValidationResult = validate_cases(
            self.settings, store, ids, weights, self.world.device
        )
        values = {"validation/score": found.score}
        for name in found.dice:
            values[f"validation/dice_{name}"] = found.dice[name]
            values[f"validation/dice_global_{name}"] = found.dice_global[name]
        writer.scalars(step, {name: value for name, value in values.items() if value == value})
        for case_id, rgb_YXC in found.pictures.items():
            writer.picture(step, f"validation/{case_id}", rgb_YXC)
        self.progress.last_dice = {k: v for k, v in found.dice.items() if v == v}
        self.progress.last_dice_step = step
        if found.score > self.progress.best_score:
            self.progress.best_score, self.progress.best_step = found.score, step
            if self.settings.checkpoint.keep_best and self.world.is_main:
                try:
                    self.folder.export(self.folder.best, weights)
                except RunFailed as error:  # a full disk now may be empty at the end
                    print(f"warning: {error}", file=sys.stderr)

    def weights(self) -> dict[str, torch.Tensor]:
        """What is validated and exported: the average when EMA is on, else the weights. A collective call."""
        return self.ema.weights() if self.ema.decay else self.parts.strategy.weights()

    def _save_is_due(self, step: int) -> bool:
        settings = self.settings.checkpoint
        late = (
            broadcast_from_rank0(time.monotonic() - self._last_save_s > settings.every_minutes * 60)
            if step % 10 == 0
            else False
        )
        return step % settings.every_steps == 0 or late

    def _save(self, *, wait: bool = False) -> bool:
        self._last_save_s = time.monotonic()
        self.watch.mark(self.progress.step - 1, "saving")
        self.progress.scaler = dict(self.parts.strategy.scaler.state_dict())
        state = {"progress": asdict(self.progress), "world_size": world_size()}
        self._saved_step = self.progress.step
        return self.checkpoints.save(self.progress.step, self._tensors(), state, wait=wait)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {**self.parts.strategy.state(), **self.ema.state()}

    def _close(self) -> bool:
        """The last checkpoint and the portable weights. Whether the checkpoint is safe on disk, by rank 0's word."""
        fine = self.checkpoints.finish()
        again = not fine or self._saved_step != self.progress.step
        saved = bool(
            broadcast_from_rank0(self._save(wait=True) if broadcast_from_rank0(again) else fine)
        )
        weights = self.weights()
        problem: RunFailed | None = None
        if self.world.is_main:
            try:
                self.folder.export(self.folder.model, weights)
            except RunFailed as error:
                problem = error
        if (
            problem := broadcast_from_rank0(problem)
        ) is not None:  # every rank ends with the same words, none waits for another
            raise problem
        return saved

    def _results(self) -> dict[str, float]:
        dice = {f"result/dice_{name}": value for name, value in self.progress.last_dice.items()}
        best = {"result/best_score": self.progress.best_score} if self.progress.best_step else {}
        return {
            **dice,
            **best,
            "result/loss": self._recent[-1].loss if self._recent else float("nan"),
        }

    def _writer(self) -> Writer:
        if not self.world.is_main:
            return NullWriter()
        writer = RunWriter(self.folder.path, self.progress.step)
        if self.progress.step == 0:
            writer.text("config", "```yaml\n" + self.settings.to_public_yaml() + "\n```")
        return writer

    def _figures(self, result: StepResult) -> dict[str, float]:
        times = np.array([r.step_s for r in self._recent])
        samples_per_s = self.settings.train.global_batch_size / float(times.mean())
        tflops = samples_per_s / world_size() * self._sample_flops / 1e12
        values = {
            "train/loss": result.loss,
            **{part_name(name): value for name, value in result.parts.items()},
            "train/learning_rate": result.learning_rate,
            "train/gradient_norm": result.gradient_norm,
            "speed/samples_per_s": samples_per_s,
            "speed/samples_per_s_per_rank": samples_per_s / world_size(),
            "speed/tflops_per_s_per_rank": tflops,
            "speed/step_s_median": float(np.median(times)),
            "speed/step_s_p95": float(np.percentile(times, 95)),
            "speed/data_wait_s": result.wait_s,
            "speed/data_wait_share": sum(r.wait_s for r in self._recent) / float(times.sum()),
            "memory/host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        if self.world.device.type == "cuda":
            values["memory/gpu_gib"] = torch.cuda.max_memory_allocated(self.world.device) / 2**30
            name = torch.cuda.get_device_name(self.world.device)
            if peak := peak_tflops(name, self.settings.train.precision):
                values["speed/mfu"] = tflops / peak
        return {name: value for name, value in values.items() if np.isfinite(value)}

    def _note(self, result: StepResult) -> str:
        return f"loss {result.loss:.3f}  {self.progress.describe_dice()}".rstrip()
