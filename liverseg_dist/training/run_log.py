"""What a training run shows and records: metrics, status file, progress line, profile.

All ranks make the same calls, so the training loop does not ask for the rank. Only rank 0 has real
writers; the other ranks have writers without effect.
"""

import logging
import resource
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial

import numpy as np
import torch

from liverseg_dist.config import Settings
from liverseg_dist.distributed.collectives import world_size
from liverseg_dist.distributed.world import World
from liverseg_dist.logging_setup import ONCE
from liverseg_dist.model.flops import peak_tflops, sample_flops
from liverseg_dist.tracking.profile import StepProfile
from liverseg_dist.tracking.progress import ProgressLine, show_progress
from liverseg_dist.tracking.tags import part_name
from liverseg_dist.tracking.writer import NullWriter, RunWriter, Writer
from liverseg_dist.training.hparams import comparable_settings
from liverseg_dist.training.resume_state import ResumeState
from liverseg_dist.training.run_folder import RunFolder
from liverseg_dist.training.step_figures import StepResult
from liverseg_dist.training.validation import ValidationResult

STATUS_INTERVAL_S = 5.0
"""Minimum time between two updates of `status.json` during training."""
RECENT_STEPS = 200
"""Number of steps over which speeds are averaged."""
_logger = logging.getLogger(__name__)


class RunLog:
    """Log of one start of a run. Use it as a context manager around the training loop.

    Args:
        progress: the run's progress, which the trainer updates.
    """

    def __init__(
        self, folder: RunFolder, settings: Settings, world: World, progress: ResumeState
    ) -> None:
        self._folder, self._settings, self._world = folder, settings, world
        self._progress = progress
        self._recent: deque[StepResult] = deque(maxlen=RECENT_STEPS)
        self._last_status_s = time.monotonic()
        self._sample_flops = world.select_for_rank(
            lambda: sample_flops(settings.model, settings.data.patch_size), lambda: 0
        )
        self._writer: Writer
        self._line: ProgressLine
        self._profile = StepProfile(
            folder.path / "profile",
            world.call_on_rank0(lambda: settings.train.profile_steps),
            cuda=world.device.type == "cuda",
        )

    def __enter__(self) -> "RunLog":
        self._writer = self._world.select_for_rank(self._create_writer, NullWriter)
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    @contextmanager
    def show_progress(self) -> Iterator[None]:
        """Show a progress line on rank 0 while the block runs."""
        max_steps = self._settings.train.max_steps
        open_line = partial(show_progress, f"train {max_steps} steps", max_steps)
        with self._world.select_for_rank(open_line, partial(open_line, quiet=True)) as self._line:
            self._line.advance(self._progress.step)
            yield

    def begin_step(self, step: int) -> None:
        """Call before step `step` (from 1)."""
        self._profile.before(step)

    def log_step(self, result: StepResult | None) -> None:
        """Record a finished step and show the progress; None: no step was finished."""
        if result is None:
            return
        step = result.step
        self._recent.append(result)
        train = self._settings.train
        if step % train.log_every_steps == 0 or step == train.max_steps:
            self._writer.scalars(step, self._collect_metrics(result))
        if result.warning:
            _logger.warning(result.warning, extra=ONCE)
        dice = self._progress.describe_dice()
        self._line.advance(note=f"loss {result.loss:.3f}  {dice}".rstrip())
        self._world.call_on_rank0(partial(self._write_status, step))

    def end_step(self, step: int) -> None:
        """Call at the end of step `step` (from 1), after validation and checkpoint."""
        self._profile.after(step)

    def log_validation(self, step: int, result: ValidationResult) -> None:
        """Record a validation after step `step`. Undefined values (NaN) are left out."""
        values = {"validation/score": result.score}
        for name in result.dice:
            values[f"validation/dice_{name}"] = result.dice[name]
            values[f"validation/dice_global_{name}"] = result.dice_global[name]
        self._writer.scalars(step, _drop_undefined(values))
        for case_id, rgb_YXC in result.pictures.items():
            self._writer.picture(step, f"validation/{case_id}", rgb_YXC)

    def log_result(self) -> None:
        """Record the settings and the final scores of a finished run, for TensorBoard's HParams."""
        results: dict[str, float] = {}
        for name, value in self._progress.last_dice.items():
            results[f"result/dice_{name}"] = value
        if self._progress.best_step:
            results["result/best_score"] = self._progress.best_score
        results["result/loss"] = self._recent[-1].loss if self._recent else float("nan")
        self._writer.hparams(self._progress.step, comparable_settings(self._settings), results)

    def _create_writer(self) -> Writer:
        writer = RunWriter(self._folder.path, self._progress.step)
        # A resumed run has recorded its settings before.
        if self._progress.step == 0:
            writer.text("config", "```yaml\n" + self._settings.to_public_yaml() + "\n```")
        return writer

    def _write_status(self, step: int) -> None:
        now = time.monotonic()
        if now - self._last_status_s < STATUS_INTERVAL_S:
            return
        self._last_status_s = now
        # A full disk must not end the run; the next status may be written again.
        with suppress(OSError):
            self._folder.set_status("running", step, self._settings.train.max_steps)

    def _collect_metrics(self, result: StepResult) -> dict[str, float]:
        """Return the metrics of a step and the speed of the recent steps."""
        times = np.array([recent.step_s for recent in self._recent])
        wait_s = sum(recent.wait_s for recent in self._recent)
        samples_per_s = self._settings.train.global_batch_size / float(times.mean())
        tflops = samples_per_s / world_size() * self._sample_flops / 1e12
        values = {"train/loss": result.loss}
        for name, value in result.parts.items():
            values[part_name(name)] = value
        values |= {
            "train/learning_rate": result.learning_rate,
            "train/gradient_norm": result.gradient_norm,
            "speed/samples_per_s": samples_per_s,
            "speed/samples_per_s_per_rank": samples_per_s / world_size(),
            "speed/tflops_per_s_per_rank": tflops,
            "speed/step_s_median": float(np.median(times)),
            "speed/step_s_p95": float(np.percentile(times, 95)),
            "speed/data_wait_s": result.wait_s,
            "speed/data_wait_share": wait_s / float(times.sum()),
            # Linux reports ru_maxrss in KiB.
            "memory/host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        device = self._world.device
        if device.type == "cuda":
            values["memory/gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            name = torch.cuda.get_device_name(device)
            peak = peak_tflops(name, self._settings.train.precision)
            if peak:
                values["speed/mfu"] = tflops / peak
        return _drop_undefined(values)


def _drop_undefined(values: Mapping[str, float]) -> dict[str, float]:
    """Remove NaN and infinite values, which JSON and TensorBoard cannot show."""
    return {name: value for name, value in values.items() if np.isfinite(value)}
