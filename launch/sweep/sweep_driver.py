"""A sweep in its driver: which trial comes next, what a trial's folder holds, what was decided."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from liverseg_dist.config import Settings, load_settings
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.errors import RunFailed, UserError
from liverseg_dist.files import write_text
from liverseg_dist.planning.memory_fit import check_fit

from .fold import FoldJob
from .generations import decide_group, next_stop
from .journal import Journal, Rung, Trial
from .search import propose_params, trial_id
from .sweep_config import SweepSettings, to_yaml, trial_tree

Say = Callable[[str], None]

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
AGAIN = "see to that and run the same line again, all is kept"


@dataclass(frozen=True)
class Sweep:
    """What searcher and scheduler share."""

    settings: SweepSettings
    folder: Path
    journal: Journal
    say: Say

    def __deepcopy__(self, _memo: object) -> "Sweep":
        return self

    def __getstate__(self) -> dict[str, object]:
        """Tune pickles searcher and scheduler for a restore of its own, which is never asked for."""
        return {}

    @property
    def in_generations(self) -> bool:
        """Whether trials wait for one another at their rungs."""
        return self.settings.sweep.scheduler != "asha"

    def next_trial(self) -> Trial | None:
        """The next trial that can run, journalled; hyperparameters no run accepts are marked failed on the way."""
        while (
            sum(not trial.parent for trial in self.journal.trials.values())
            < self.settings.sweep.trials
        ):
            history = list(self.journal.trials.values())
            params = propose_params(self.settings.sweep, self.settings.seed, len(history), history)
            if params is None:
                return None
            trial = self.journal.begin(trial_id(params), params)
            if self.prepare(trial):
                return trial
        return None

    def stops_of(self, trial: Trial) -> list[int]:
        """The steps to which the trial is trained now, one report each."""
        return (
            [next_stop(self.settings, trial)] if self.in_generations else list(self.settings.stops)
        )

    def prepare(self, trial: Trial) -> bool:
        """Write the trial's config.yaml; False when its hyperparameters are invalid or need too much memory."""
        folder = self.folder_of(trial.id)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "config.yaml"
        write_text(
            file,
            to_yaml(
                trial_tree(self.settings, trial.params), f"trial {trial.number}: {trial.params}"
            ),
        )
        try:
            reason = self._too_large(load_settings([file]))
        except UserError as error:
            reason = str(error).removeprefix(f"{file}: ")
        if reason:
            self.fail(trial, reason)
        elif trial.parent:
            self._go_on_from_parent(trial)
        return not reason

    def _go_on_from_parent(self, trial: Trial) -> None:
        """Give each fold its parent's checkpoint, before the parent goes on and drops it."""
        for fold in self.settings.sweep.folds:
            part = Path(f"fold_{fold}", "checkpoints", f"step_{trial.from_step}")
            source, target = self.folder_of(trial.parent) / part, self.folder_of(trial.id) / part
            if (target.parent.parent / "config.yaml").exists() or target.exists():
                continue
            aside = target.with_name(f".{target.name}.tmp")
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copytree(source, aside, copy_function=_link)
                aside.rename(target)
            except (OSError, shutil.Error) as error:
                raise RunFailed(
                    f"{source} cannot be handed on to trial {trial.id}: {error}"
                ) from None

    def _too_large(self, settings: Settings) -> str:
        """Why a fold would not fit into `memory.budget_gib`, where one is set; found before anything is started."""
        budget_gib, resources = settings.memory.budget_gib, self.settings.sweep.resources
        if budget_gib is None:
            return ""
        device = "cuda" if resources.gpus else "cpu"
        found = check_fit(settings, self.spacing_mm, budget_gib, resources.world_size, device)
        return "" if found.fits else f"not tried: {found.reason}"

    @cached_property
    def spacing_mm(self) -> tuple[float, float, float]:
        return CaseStore.open(str(self.settings.data.store)).spacing_mm

    def folder_of(self, trial: str) -> Path:
        return self.folder / "trials" / trial

    def jobs(self, trial: Trial) -> list[FoldJob]:
        sweep = self.settings.sweep
        resources = sweep.resources
        return [
            FoldJob(
                str(self.folder_of(trial.id)), fold, resources.nodes, resources.cpus, resources.gpus,
                resources.processes, sweep.metric.model_dump(), sweep.max_failures,
            )
            for fold in sweep.folds
        ]  # fmt: skip

    def fail(self, trial: Trial, reason: str) -> None:
        """Raises `RunFailed`, and holds nothing against the trial, where a disk is full or locked."""
        _check_disk(reason, [self.folder_of(trial.id), *(job.folder for job in self.jobs(trial))])
        self.journal.fail(trial.id, reason)
        self.say(f"{trial_label(trial)} failed: {reason}")
        self.settle()

    def record(self, trial: Trial, rung: Rung) -> None:
        """All folds of a trial have reached a rung or the end."""
        self.journal.rung(trial.id, rung)
        words = {
            "end": "finished",
            "prune": "pruned",
            "continue": "goes on",
            "wait": "waits for its group",
        }
        reached = (
            f"{trial_label(trial)} step {rung.step}: Dice {rung.score:.4f} ± {rung.spread:.4f}"
        )
        self.say(f"{reached}, {words[rung.decision]}")
        self.settle()

    def settle(self) -> None:
        """Decide on those that wait, if their groups are there now."""
        made = (
            decide_group(self.settings, list(self.journal.trials.values()))
            if self.in_generations
            else []
        )
        if made:
            children = [asdict(one.child) for one in made if one.child]
            self.journal.decide({one.trial.id: one.decision for one in made}, children)
        for one in made:
            said = {"continue": "goes on", "prune": "pruned", "replace": "replaced"}[one.decision]
            if one.child:
                child, parent = (
                    self.journal.trials[one.child.id],
                    self.journal.trials[one.child.parent],
                )
                said += f" by {trial_label(child)}, from the checkpoints of {trial_label(parent)}, with {child.params}"
            self.say(f"{trial_label(one.trial)} step {one.trial.step}: {said}")
        for one in made:
            if one.child:
                self.prepare(self.journal.trials[one.child.id])


def trial_label(trial: Trial) -> str:
    return f"trial {trial.number} ({trial.id})"


def _link(source: str, target: str) -> None:
    """Files of a checkpoint are never changed once written: a second name will do, where the file system has such."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _check_disk(reason: str, folders: Sequence[Path]) -> None:
    """By what the trainer said, and by trying: what it could not write is perhaps gone by now, and the room is back."""
    try:
        for folder in folders:
            if folder.is_dir():
                with tempfile.TemporaryFile(dir=folder) as file:
                    file.write(bytes(4096))
    except OSError as error:
        raise RunFailed(f"{folder}: {error.strerror}; {AGAIN} ({reason})") from error
    if any(os.strerror(number) in reason for number in DISK_ERRORS):
        raise RunFailed(f"{reason}; {AGAIN}")
