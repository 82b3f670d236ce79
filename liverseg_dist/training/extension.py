"""`train.max_steps` may change while a run exists: what that does to the schedule and to the run's files.

The learning rate of a step is a function of the step and of the `train.max_steps` in force at that step. A run of 60
steps that is extended to 100 keeps the schedule for 60 steps in steps 1 to 60 and follows the schedule for 100 steps
from step 61 on. `config_until_step_60.yaml` keeps the earlier settings, so a run that falls back to an older checkpoint
repeats the steps up to 60 with the rates they had. `config.yaml` always holds the settings in force now.
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
"""(last step, max_steps in force up to it) of each period before the present one, in order of steps."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step of a run, also of one whose `max_steps` was changed."""

    config: TrainConfig
    """In force now."""
    earlier: Horizons = ()

    def rate(self, step: int) -> float:
        """Learning rate of optimizer step `step` (from 0)."""
        for last_step, max_steps in self.earlier:
            if step < last_step:
                return learning_rate(self.config.model_copy(update={"max_steps": max_steps}), step)
        return learning_rate(self.config, step)


def read_horizons(folder: Path) -> Horizons:
    """From the settings that a run's folder keeps of earlier periods."""
    found: list[tuple[int, int]] = []
    for path in folder.glob(f"{PREFIX}*{SUFFIX}"):
        number = path.name.removeprefix(PREFIX).removesuffix(SUFFIX)
        if number.isascii() and number.isdecimal():
            found.append(
                (int(number), load_settings([path], warn_of_old_keys=False).train.max_steps)
            )
    return tuple(sorted(found))


def change_max_steps(folder: RunFolder, settings: Settings, step: int) -> str:
    """Let the run in `folder`, resumed at `step`, end at the `max_steps` of `settings`. For rank 0.

    Returns:
        What changed, for the terminal; empty if nothing did.

    Raises:
        UserError: `step` is past the wanted end.
    """
    before = load_settings([folder.config], warn_of_old_keys=False)
    old, new = before.train.max_steps, settings.train.max_steps
    if old == new:
        return ""
    if new < step:
        raise UserError(
            f"{folder.path}: train.max_steps={new} lies before step {step}, which is done; give {step} or more, or "
            "another run.dir"
        )
    kept = folder.path / f"{PREFIX}{step}{SUFFIX}"
    weights = folder.path / f"model_step_{step}.safetensors"
    # A second change at the same step replaces settings that no step was taken with: the first file stays.
    if step and not kept.exists():
        write_text(kept, before.to_yaml())
    if folder.is_finished_at(step) and not weights.exists():
        _keep_copy(folder.model, weights)
    changed = before.model_copy(
        update={"train": before.train.model_copy(update={"max_steps": new})}
    )
    # Last: until config.yaml is replaced, the same command starts over with all of this.
    write_text(folder.config, changed.to_yaml())
    return _describe_change(folder, Schedule(settings.train, read_horizons(folder.path)), old, step)


def _keep_copy(source: Path, target: Path) -> None:
    """A second name for a file; a copy where the file system has no hard links. A missing file is no error."""
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
        rates = f"{schedule.rate(step - 1):.3g} in step {step}, {schedule.rate(step):.3g} in step {step + 1}"
        lines.append(
            f"learning rate: from step {step + 1} on that of a schedule of {new} steps ({schedule.config.schedule.name}"
            f"): {rates}"
        )
    if step:
        lines.append(f"earlier settings: {folder.path / f'{PREFIX}{step}{SUFFIX}'}")
    weights = folder.path / f"model_step_{step}.safetensors"
    if weights.exists():
        lines.append(f"weights of the finished {step} steps: {weights}")
    return "\n".join(lines)
