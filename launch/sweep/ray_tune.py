"""The sweep under Ray Tune: trials as function trainables, folds as tasks in the trial's placement group.

Ray decides what runs where; the journal holds what was decided, and nothing of Ray's own state is read again.
"""

from dataclasses import asdict
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.error import TuneError
from ray.tune.search import Searcher

from liverseg_dist.errors import RunFailed, UserError

from .journal import Trial
from .schedulers import JournalAsha, JournalScheduler
from .sweep_config import SweepSettings
from .sweep_driver import Sweep
from .trial import run_trial


class JournalSearch(Searcher):
    """Gives Ray the trials that are to run on, and new ones when there are none."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(metric="score", mode="max")
        self._sweep = sweep
        self._running: dict[str, tuple[Trial, int]] = {}
        """Ray's id -> our trial, and the step it started from."""
        for trial in sweep.journal.unsettled:
            sweep.prepare(trial)
        sweep.settle()

    def suggest(self, trial_id: str) -> Any:
        trial = self._next()
        if trial is None:
            return None if self._sweep.journal.unsettled else Searcher.FINISHED
        self._running[trial_id] = (trial, trial.step)
        jobs = [asdict(job) for job in self._sweep.jobs(trial)]
        parallel = parallel_folds(self._sweep.settings)
        return {
            "trial": trial.id,
            "stops": self._sweep.stops_of(trial),
            "jobs": jobs,
            "parallel": parallel,
        }

    def _next(self) -> Trial | None:
        taken = {trial.id for trial, _ in self._running.values()}
        ready = (
            t for t in self._sweep.journal.unsettled if t.state == "running" and t.id not in taken
        )
        return next(ready, None) or self._sweep.next_trial()

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        trial, step = self._running.pop(trial_id)
        if trial.state == "running" and trial.step == step:  # or it would be tried for ever
            self._sweep.fail(trial, "its Ray process ended without a result")

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


def concurrent_trials(settings: SweepSettings, cpus: float, gpus: float) -> int:
    """Trials that fit at once. Raises `UserError` when not even one does."""
    sweep = settings.sweep
    resources = sweep.resources
    parts = parallel_folds(settings) * resources.nodes
    fits = int(cpus // (resources.cpus * parts))
    if resources.gpus:
        fits = min(fits, int(gpus / (resources.gpus * parts) + 1e-9))
    if fits < 1:
        nodes = f" on each of {resources.nodes} nodes" if resources.nodes > 1 else ""
        raise UserError(
            f"a trial runs {parallel_folds(settings)} fold(s) at once with {resources.cpus} CPU(s) and "
            f"{resources.gpus:g} GPU(s) each{nodes}, but Ray has {cpus:g} CPUs and {gpus:g} GPUs; lower "
            "sweep.resources.parallel_folds, .nodes, .cpus or .gpus"
        )
    return min(fits, sweep.max_concurrent or fits)


def parallel_folds(settings: SweepSettings) -> int:
    sweep = settings.sweep
    return min(len(sweep.folds), sweep.resources.parallel_folds or len(sweep.folds))


def tune_trials(sweep: Sweep) -> int:
    """All trials that are not settled yet. Needs a running Ray; returns, when every trial is settled, how many folds
    ran at once."""
    settings = sweep.settings
    resources, available = settings.sweep.resources, ray.cluster_resources()
    at_once = concurrent_trials(settings, available.get("CPU", 0), available.get("GPU", 0))
    bundle = {"CPU": float(resources.cpus), **({"GPU": resources.gpus} if resources.gpus else {})}
    bundles: list[dict[str, float]] = [{}, *([bundle] * parallel_folds(settings) * resources.nodes)]
    tuner = tune.Tuner(
        tune.with_resources(run_trial, tune.PlacementGroupFactory(bundles)),
        tune_config=tune.TuneConfig(
            search_alg=JournalSearch(sweep),
            scheduler=(JournalScheduler if sweep.in_generations else JournalAsha)(sweep),
            num_samples=-1,  # the search says when it is over
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
        ours = last.partition(f"{RunFailed.__name__}: ")[2]
        raise RunFailed(
            ours or f"Ray Tune ended: {last[:300]}; run the same line again to continue"
        ) from error
    return at_once * parallel_folds(settings)
