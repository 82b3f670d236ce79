"""The sweep under Ray Tune: trials as function trainables, folds as tasks in the trial's placement group.

Ray decides what runs where and ASHA what is pruned; the journal holds every decision, and a decision is never made
twice. ASHA: Li et al. 2020, https://arxiv.org/abs/1810.05934. With several trials at once its decisions depend on who
reaches a rung first, as in any asynchronous halving; with one trial at a time (`sweep.max_concurrent=1`) a sweep is
reproducible in full.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.error import TuneError
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from launch.sweep.config import SweepSettings, to_yaml, trial_tree
from launch.sweep.fold import FoldJob
from launch.sweep.journal import Journal, Rung, Trial
from launch.sweep.search import propose, trial_id
from launch.sweep.trial import run_trial
from liverseg_dist.config import Settings, load_settings
from liverseg_dist.data.store import CaseStore
from liverseg_dist.errors import RunFailed, UserError
from liverseg_dist.training.planning.choose import fits
from liverseg_dist.training.run_folder import write_text

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sweep:
    """What the parts below share in the driver."""

    settings: SweepSettings
    folder: Path
    journal: Journal
    say: Say

    def next_trial(self) -> Trial | None:
        """The next trial that can run, journalled; hyperparameters no run accepts are marked failed on the way."""
        while len(self.journal.trials) < self.settings.sweep.trials:
            history = list(self.journal.trials.values())
            params = propose(self.settings.sweep, self.settings.seed, len(history), history)
            if params is None:
                return None
            trial = self.journal.begin(trial_id(params), params)
            if self.prepare(trial):
                return trial
        return None

    def prepare(self, trial: Trial) -> bool:
        """Write the trial's config.yaml; False when its hyperparameters are invalid or need too much memory."""
        folder = self.folder / "trials" / trial.id
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "config.yaml"
        write_text(file, to_yaml(trial_tree(self.settings, trial.params), f"trial {trial.number}: {trial.params}"))
        try:
            reason = self._too_large(load_settings([file]))
        except UserError as error:
            reason = str(error).removeprefix(f"{file}: ")
        if reason:
            self.journal.fail(trial.id, reason)
            self.say(f"{label(trial)} failed: {reason}")
        return not reason

    def _too_large(self, settings: Settings) -> str:
        """Why a fold would not fit into `memory.budget_gib`, where one is set; found before anything is started."""
        budget_gib, resources = settings.memory.budget_gib, self.settings.sweep.resources
        if budget_gib is None:
            return ""
        device = "cuda" if resources.gpus else "cpu"
        found = fits(settings, self.spacing_mm, budget_gib, resources.processes, device)
        return "" if found.fits else f"not tried: {found.reason}"

    @cached_property
    def spacing_mm(self) -> tuple[float, float, float]:
        return CaseStore.open(str(self.settings.data.store)).spacing_mm

    def jobs(self, trial: Trial) -> list[FoldJob]:
        sweep = self.settings.sweep
        resources = sweep.resources
        return [
            FoldJob(
                str(self.folder / "trials" / trial.id), fold, resources.cpus, resources.gpus, resources.processes,
                sweep.metric.model_dump(), sweep.max_failures,
            )
            for fold in sweep.folds
        ]  # fmt: skip


def label(trial: Trial) -> str:
    return f"trial {trial.number} ({trial.id})"


class JournalSearch(Searcher):
    """Gives Ray the unsettled trials of an interrupted sweep first, then new ones."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(metric="score", mode="max")
        self._sweep = sweep
        self._resumed = [trial for trial in sweep.journal.unsettled if sweep.prepare(trial)]

    def suggest(self, trial_id: str) -> Any:
        trial = self._resumed.pop(0) if self._resumed else self._sweep.next_trial()
        if trial is None:
            return Searcher.FINISHED
        stops = list(self._sweep.settings.stops)
        return {"trial": trial.id, "stops": stops, "jobs": [asdict(job) for job in self._sweep.jobs(trial)]}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        pass  # proposals are made from the journal

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class JournalAsha(ASHAScheduler):
    """Ray's ASHA over rung numbers (so that rungs may lie anywhere), with its memory filled from the journal."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        factor, rungs = sweep.settings.sweep.reduction_factor, sweep.settings.sweep.rungs
        self._budgets = {step: factor**number for number, step in enumerate(rungs)}
        # max_t lies between the last rung and the next: Ray counts floor(log(max_t) / log(factor)) + 1 rungs
        super().__init__(
            "budget", "score", "max", max_t=math.ceil(factor ** max(0, len(rungs) - 1) * 1.1), grace_period=1,
            reduction_factor=factor,
        )  # fmt: skip
        self._names: dict[str, str] = {}
        for trial in sweep.journal.trials.values():
            self._remember(trial, trial.id)

    def _remember(self, trial: Trial, name: str) -> None:
        budgets = {self._budgets[rung.step]: rung.score for rung in trial.rungs if rung.step in self._budgets}
        for milestone, recorded in self._brackets[0]._rungs:
            recorded.pop(trial.id, None)
            for budget, score in budgets.items():
                if abs(milestone - budget) < 1e-6 * budget:
                    recorded[name] = score

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        self._names[trial.trial_id] = trial.config["trial"]
        self._remember(self._sweep.journal.trials[trial.config["trial"]], trial.trial_id)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        journal = self._sweep.journal
        ours = journal.trials[result["trial"]]
        if "failed" in result:
            self._fail(ours, result["failed"])
            return str(TrialScheduler.STOP)
        step = result["step"]
        if any(rung.step == step for rung in ours.rungs):  # told again after an interruption
            return str(TrialScheduler.CONTINUE)
        decision = "end"
        if step in self._budgets:
            asked = {"budget": self._budgets[step], "score": result["score"]}
            action = super().on_trial_result(tune_controller, trial, asked)
            decision = "prune" if action == TrialScheduler.STOP else "continue"
        journal.rung(ours.id, Rung.of(step, json.loads(result["folds"]), decision, result["seconds"]))
        rung = ours.rungs[-1]
        word = {"end": "finished", "prune": "pruned", "continue": "goes on"}[decision]
        self._sweep.say(f"{label(ours)} step {step}: Dice {rung.score:.4f} ± {rung.spread:.4f}, {word}")
        return str(TrialScheduler.CONTINUE if decision == "continue" else TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict) -> None:
        self._trial_info.pop(trial.trial_id, None)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._trial_info.pop(trial.trial_id, None)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Ray has given the trial's own process up, after its restarts."""
        ours = self._sweep.journal.trials[self._names[trial.trial_id]]
        lines = [line for line in str(getattr(trial, "get_error", lambda: "")() or "").splitlines() if line.strip()]
        self._fail(ours, f"its Ray process ended: {lines[-1].strip()[:300] if lines else 'no word'}")

    def _fail(self, trial: Trial, reason: str) -> None:
        self._sweep.journal.fail(trial.id, reason)
        self._sweep.say(f"{label(trial)} failed: {reason}")


def concurrency(settings: SweepSettings, cpus: float, gpus: float) -> int:
    """Trials that fit at once. Raises `UserError` when not even one does."""
    sweep = settings.sweep
    resources = sweep.resources
    parallel = parallel_folds(settings)
    fits = int(cpus // (resources.cpus * parallel))
    if resources.gpus:
        fits = min(fits, int(gpus / (resources.gpus * parallel) + 1e-9))
    if fits < 1:
        raise UserError(
            f"a trial runs {parallel} fold(s) at once with {resources.cpus} CPU(s) and {resources.gpus:g} GPU(s) each, "
            f"but Ray has {cpus:g} CPUs and {gpus:g} GPUs; lower sweep.resources.parallel_folds, .cpus or .gpus"
        )
    return min(fits, sweep.max_concurrent or fits)


def parallel_folds(settings: SweepSettings) -> int:
    sweep = settings.sweep
    return min(len(sweep.folds), sweep.resources.parallel_folds or len(sweep.folds))


def tune_trials(sweep: Sweep) -> None:
    """All trials that are not settled yet. Needs a running Ray; returns when every trial is settled."""
    settings = sweep.settings
    resources, available = settings.sweep.resources, ray.cluster_resources()
    at_once = concurrency(settings, available.get("CPU", 0), available.get("GPU", 0))
    bundle = {"CPU": float(resources.cpus), **({"GPU": resources.gpus} if resources.gpus else {})}
    bundles: list[dict[str, float]] = [{}, *([bundle] * parallel_folds(settings))]
    left = settings.sweep.trials - len(sweep.journal.trials) + len(sweep.journal.unsettled)
    tuner = tune.Tuner(
        tune.with_resources(run_trial, tune.PlacementGroupFactory(bundles)),
        tune_config=tune.TuneConfig(
            search_alg=JournalSearch(sweep),
            scheduler=JournalAsha(sweep),
            num_samples=left,
            max_concurrent_trials=at_once,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(sweep.folder / ".ray"),
            failure_config=tune.FailureConfig(max_failures=settings.sweep.max_failures),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except (TuneError, RayError) as error:
        last = str(error).strip().splitlines()[-1]
        raise RunFailed(f"Ray Tune ended: {last[:300]}; run the same line again to continue") from error
