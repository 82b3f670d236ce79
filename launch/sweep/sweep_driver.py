"""The driver of a sweep: which trial runs next, the folders of the trials, and the decisions."""

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

from .fold import FoldTask
from .generations import Decision, decide_groups, find_next_stop
from .journal import Journal, Rung, Trial
from .search import DICE_PREFIX, propose_params, trial_id
from .sweep_config import SweepConfig, SweepSettings, build_trial_config, to_yaml

PrintLine = Callable[[str], None]

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
HOW_TO_CONTINUE = "fix that and run the same line again, all results are kept"
OUTCOMES = {
    "end": "finished",
    "prune": "pruned",
    "continue": "continues",
    "wait": "waits for its group",
    "replace": "replaced",
}
"""Decision -> text for the log."""


def weigh_structures(config: SweepConfig, structures: Sequence[str]) -> dict[str, float]:
    """Weight of each structure in the score of a fold.

    Raises:
        UserError: `sweep.metric` or `sweep.objectives` names a structure that the store does not
            have, or all weights are 0.
    """
    known = ", ".join(structures)
    for name in config.metric:
        if name not in structures:
            raise UserError(f"sweep.metric: the store has no structure {name}; it has {known}")
    for objective in config.objectives:
        name = objective.removeprefix(DICE_PREFIX)
        if name != objective and name not in structures:
            raise UserError(f"sweep.objectives: the store has no structure {name}; it has {known}")
    weights = {name: config.metric.get(name, 1.0) for name in structures}
    if not any(weights.values()):
        raise UserError("sweep.metric: one of the weights must be above 0")
    return weights


@dataclass(frozen=True)
class SweepDriver:
    """The state that searcher and scheduler share."""

    settings: SweepSettings
    folder: Path
    journal: Journal
    print_line: PrintLine

    # Tune copies searcher and scheduler; the journal must stay one object.
    def __deepcopy__(self, _memo: object) -> "SweepDriver":
        return self

    def __getstate__(self) -> dict[str, object]:
        """Nothing: Tune pickles searcher and scheduler for a restore, which is never used."""
        return {}

    @property
    def decides_in_groups(self) -> bool:
        """Whether trials wait for one another at their rungs."""
        return self.settings.sweep.scheduler != "asha"

    def start_next_trial(self) -> Trial | None:
        """Add the next trial to the journal; None if the sweep has all its trials.

        Trials with hyperparameters that no run accepts are marked as failed and skipped.
        """
        while self._count_proposed_trials() < self.settings.sweep.trials:
            history = list(self.journal.trials.values())
            params = propose_params(self.settings.sweep, self.settings.seed, len(history), history)
            if params is None:
                return None
            trial = self.journal.add_trial(trial_id(params), params)
            if self.prepare_trial(trial):
                return trial
        return None

    def _count_proposed_trials(self) -> int:
        """The trials without those that replaced others."""
        return sum(not trial.parent for trial in self.journal.trials.values())

    def list_stops(self, trial: Trial) -> list[int]:
        """The steps to which the trial is trained now, with one report at each."""
        if self.decides_in_groups:
            return [find_next_stop(self.settings, trial)]
        return list(self.settings.stops)

    def prepare_trial(self, trial: Trial) -> bool:
        """Write the config.yaml of the trial, and copy the checkpoints of its parent.

        Returns:
            False if its hyperparameters are invalid or need too much memory.
        """
        folder = self.trial_dir(trial.id)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "config.yaml"
        config = build_trial_config(self.settings, trial.params)
        write_text(file, to_yaml(config, f"trial {trial.number}: {trial.params}"))
        try:
            reason = self._find_memory_problem(load_settings([file]))
        except UserError as error:
            reason = str(error).removeprefix(f"{file}: ")
        if reason:
            self.record_failure(trial, reason)
        elif trial.parent:
            self._copy_parent_checkpoints(trial)
        return not reason

    def _copy_parent_checkpoints(self, trial: Trial) -> None:
        """Copy the checkpoints before the parent continues and deletes them.

        Raises:
            RunFailed: A checkpoint cannot be copied.
        """
        for fold in self.settings.sweep.folds:
            part = Path(f"fold_{fold}", "checkpoints", f"step_{trial.from_step}")
            source = self.trial_dir(trial.parent) / part
            target = self.trial_dir(trial.id) / part
            # The fold has been copied, or has already continued from the copy.
            if (target.parent.parent / "config.yaml").exists() or target.exists():
                continue
            partial = target.with_name(f".{target.name}.tmp")
            shutil.rmtree(partial, ignore_errors=True)
            partial.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copytree(source, partial, copy_function=_link_or_copy)
                # Renamed last, so that an incomplete copy is never used as a checkpoint.
                partial.rename(target)
            except (OSError, shutil.Error) as error:
                raise RunFailed(f"{source} cannot be copied to trial {trial.id}: {error}") from None

    def _find_memory_problem(self, settings: Settings) -> str:
        """Why a fold does not fit into `memory.budget_gib`; empty if it fits.

        Found before any process is started.
        """
        budget_gib, resources = settings.memory.budget_gib, self.settings.sweep.resources
        if budget_gib is None:
            return ""
        device = "cuda" if resources.gpus else "cpu"
        fit = check_fit(settings, self.spacing_mm, budget_gib, resources.world_size, device)
        return "" if fit.fits else f"not tried: {fit.reason}"

    @cached_property
    def _store(self) -> CaseStore:
        return CaseStore.open(str(self.settings.data.store))

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel spacing of the store."""
        return self._store.spacing_mm

    @cached_property
    def structure_weights(self) -> dict[str, float]:
        """Weight of each structure of the store in the score (`weigh_structures`)."""
        return weigh_structures(self.settings.sweep, self._store.labels.structure_names)

    def trial_dir(self, id_: str) -> Path:
        """The folder of a trial."""
        return self.folder / "trials" / id_

    def build_fold_tasks(self, trial: Trial) -> list[FoldTask]:
        """The folds of a trial."""
        config = self.settings.sweep
        resources = config.resources
        tasks = []
        for fold in config.folds:
            tasks.append(
                FoldTask(
                    trial_dir=str(self.trial_dir(trial.id)),
                    fold=fold,
                    nodes=resources.nodes,
                    cpus=resources.cpus,
                    gpus=resources.gpus,
                    processes=resources.processes,
                    weights=self.structure_weights,
                    max_failures=config.max_failures,
                )
            )
        return tasks

    def record_failure(self, trial: Trial, reason: str) -> None:
        """Mark a trial as failed.

        Raises:
            RunFailed: The disk is full or read-only. The trial is not marked, because every trial
                would fail.
        """
        folder = self.trial_dir(trial.id)
        folders = [folder / f"fold_{fold}" for fold in self.settings.sweep.folds]
        _check_disk(reason, [folder, *folders])
        self.journal.add_failure(trial.id, reason)
        self.print_line(f"{format_trial_label(trial)} failed: {reason}")
        self.decide_waiting_trials()

    def record_rung(self, trial: Trial, rung: Rung) -> None:
        """Record that all folds of a trial have reached a rung or the end."""
        self.journal.add_rung(trial.id, rung)
        self.print_line(
            f"{format_trial_label(trial)} step {rung.step}: "
            f"Dice {rung.score:.4f} ± {rung.spread:.4f}, {OUTCOMES[rung.decision]}"
        )
        self.decide_waiting_trials()

    def decide_waiting_trials(self) -> None:
        """Decide about the waiting trials whose group is complete."""
        if not self.decides_in_groups:
            return
        decisions = decide_groups(self.settings, list(self.journal.trials.values()))
        if not decisions:
            return
        children = [asdict(one.child) for one in decisions if one.child]
        self.journal.add_decisions({one.trial.id: one.decision for one in decisions}, children)
        for one in decisions:
            self._print_decision(one)
        for one in decisions:
            # Last, because a failure here leads to further decisions.
            if one.child:
                self.prepare_trial(self.journal.trials[one.child.id])

    def _print_decision(self, decision: Decision) -> None:
        text = OUTCOMES[decision.decision]
        if decision.child:
            child = self.journal.trials[decision.child.id]
            parent = self.journal.trials[decision.child.parent]
            text += (
                f" by {format_trial_label(child)}, from the checkpoints of "
                f"{format_trial_label(parent)}, with {child.params}"
            )
        trial = decision.trial
        self.print_line(f"{format_trial_label(trial)} step {trial.step}: {text}")


def format_trial_label(trial: Trial) -> str:
    """`trial 3 (1f0c...)`."""
    return f"trial {trial.number} ({trial.id})"


def _link_or_copy(source: str, target: str) -> None:
    """Copy a file of a checkpoint.

    Files of a checkpoint are never changed, so a hard link is enough, if the file system has
    them.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _check_disk(reason: str, folders: Sequence[Path]) -> None:
    """Raise `RunFailed` if the folders cannot be written, or could not when the trainer failed.

    Both are checked: what the trainer could not write may be deleted by now, so that there is
    space again.

    Args:
        reason: The message of the trainer.
        folders: The folders it writes to.
    """
    for folder in folders:
        if not folder.is_dir():
            continue
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(4096))
        except OSError as error:
            raise RunFailed(f"{folder}: {error.strerror}; {HOW_TO_CONTINUE} ({reason})") from error
    if any(os.strerror(number) in reason for number in DISK_ERRORS):
        raise RunFailed(f"{reason}; {HOW_TO_CONTINUE}")
