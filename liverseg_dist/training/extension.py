"""Continue a run with another `train.max_steps`: schedule and files of the run.

The learning rate of a step depends on the step and on `train.max_steps` at that time. A run of 60
steps that is extended to 100 uses the schedule for 60 steps in steps 1 to 60, and the schedule for
100 steps from step 61 on. `config_until_step_60.yaml` keeps the earlier settings. A run that
resumes from an older checkpoint therefore repeats the steps up to 60 with the same rates.
`config.yaml` always has the present settings.
"""

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from liverseg_dist.config import Settings, TrainConfig, load_settings
from liverseg_dist.errors import UserError
from liverseg_dist.files import write_text
from liverseg_dist.training.run_folder import RunFolder
from liverseg_dist.training.schedule import learning_rate

PREFIX, SUFFIX = "config_until_step_", ".yaml"
Horizons = tuple[tuple[int, int], ...]
"""(last step, max_steps until then) of each earlier period, in order of steps."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step of a run whose `max_steps` may have changed."""

    config: TrainConfig
    """The present settings."""
    earlier: Horizons = ()

    def rate(self, step: int) -> float:
        """Return the learning rate of optimizer step `step` (from 0)."""
        for last_step, max_steps in self.earlier:
            if step < last_step:
                return learning_rate(self.config.model_copy(update={"max_steps": max_steps}), step)
        return learning_rate(self.config, step)


def read_horizons(folder: Path) -> Horizons:
    """Read the earlier periods from the settings that a run's folder keeps."""
    found: list[tuple[int, int]] = []
    for path in folder.glob(f"{PREFIX}*{SUFFIX}"):
        number = path.name.removeprefix(PREFIX).removesuffix(SUFFIX)
        if number.isascii() and number.isdecimal():
            found.append(
                (int(number), load_settings([path], warn_of_old_keys=False).train.max_steps)
            )
    return tuple(sorted(found))


def change_max_steps(folder: RunFolder, settings: Settings, step: int) -> str:
    """Change the last step of an existing run to the `max_steps` of `settings`. For rank 0.

    Args:
        folder: the run.
        settings: the new settings.
        step: step from which the run continues.

    Returns:
        Description of the change for the user; empty without a change.

    Raises:
        UserError: the run has done more steps than the new `max_steps`.
    """
    before = load_settings([folder.config], warn_of_old_keys=False)
    old, new = before.train.max_steps, settings.train.max_steps
    if old == new:
        return ""
    if new < step:
        raise UserError(
            f"{folder.path}: the run has done {step} steps, more than train.max_steps={new}; set "
            f"at least {step}, or choose another run.dir"
        )
    kept = folder.path / f"{PREFIX}{step}{SUFFIX}"
    weights = folder.path / f"model_step_{step}.safetensors"
    # A second change at the same step replaces settings that no step has used: keep the first file.
    if step and not kept.exists():
        write_text(kept, before.to_yaml())
    # A finished run's weights are a result: keep them when the run goes on.
    if folder.is_finished_at(step) and not weights.exists():
        _keep_copy(folder.model, weights)
    changed = before.model_copy(
        update={"train": before.train.model_copy(update={"max_steps": new})}
    )
    # As the last file: if the process ends before, the same command repeats the change.
    write_text(folder.config, changed.to_yaml())
    return _describe_change(folder, Schedule(settings.train, read_horizons(folder.path)), old, step)


def _keep_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it if the file system has no hard links. It may be missing."""
    with suppress(FileNotFoundError):
        try:
            os.link(source, target)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copyfile(source, target)


def _describe_change(folder: RunFolder, schedule: Schedule, old: int, step: int) -> str:
    new = schedule.config.max_steps
    lines = [f"train.max_steps changes from {old} to {new} after step {step}"]
    if step and new > step:
        lines.append(
            f"learning rate: from step {step + 1} on that of a schedule of {new} steps "
            f"({schedule.config.schedule.name}): {schedule.rate(step - 1):.3g} in step {step}, "
            f"{schedule.rate(step):.3g} in step {step + 1}"
        )
    if step:
        lines.append(f"earlier settings: {folder.path / f'{PREFIX}{step}{SUFFIX}'}")
    weights = folder.path / f"model_step_{step}.safetensors"
    if weights.exists():
        lines.append(f"weights of the finished {step} steps: {weights}")
    return "\n".join(lines)
