"""The sweep under Ray Tune: trials as function trainables, folds as tasks in the placement group.

Ray decides where the work runs. The journal has all decisions; Ray's own state is never read again.
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
from .sweep_driver import SweepDriver
from .trial import run_trial


class JournalSearch(Searcher):
    """Gives Ray the trials that have to continue, and new ones after them."""

    def __init__(self, driver: SweepDriver) -> None:
        super().__init__(metric="score", mode="max")
        self._driver = driver
        self._running: dict[str, tuple[Trial, int]] = {}
        """Ray's trial id -> trial of the journal, and the step at which it started."""
        for trial in driver.journal.open_trials:
            driver.prepare_trial(trial)
        driver.decide_waiting_trials()

    def suggest(self, trial_id: str) -> Any:
        trial = self._find_next_trial()
        if trial is None:
            return None if self._driver.journal.open_trials else Searcher.FINISHED
        self._running[trial_id] = (trial, trial.step)
        return {
            "trial": trial.id,
            "stops": self._driver.list_stops(trial),
            "tasks": [asdict(task) for task in self._driver.build_fold_tasks(trial)],
            "parallel": count_parallel_folds(self._driver.settings),
        }

    def _find_next_trial(self) -> Trial | None:
        """A trial of the journal that is not running, otherwise a new one."""
        taken = {trial.id for trial, _ in self._running.values()}
        for trial in self._driver.journal.open_trials:
            if trial.state == "running" and trial.id not in taken:
                return trial
        return self._driver.start_next_trial()

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        trial, step = self._running.pop(trial_id)
        # Without this failure the trial would be tried without end.
        if trial.state == "running" and trial.step == step:
            self._driver.record_failure(trial, "its Ray process ended without a result")

    # Tune requires these two; the journal is the state of the search.
    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


def count_concurrent_trials(settings: SweepSettings, cpus: float, gpus: float) -> int:
    """How many trials fit at the same time.

    Args:
        settings: The settings of the sweep.
        cpus: CPUs of the Ray cluster.
        gpus: GPUs of the Ray cluster.

    Raises:
        UserError: Not even one trial fits.
    """
    config = settings.sweep
    resources = config.resources
    parts = count_parallel_folds(settings) * resources.nodes
    fitting = int(cpus // (resources.cpus * parts))
    if resources.gpus:
        # The small number corrects rounding, e.g. of 0.3 / 0.1.
        fitting = min(fitting, int(gpus / (resources.gpus * parts) + 1e-9))
    if fitting < 1:
        nodes = f" on each of {resources.nodes} nodes" if resources.nodes > 1 else ""
        raise UserError(
            f"a trial runs {count_parallel_folds(settings)} fold(s) at the same time with "
            f"{resources.cpus} CPU(s) and {resources.gpus:g} GPU(s) each{nodes}, but Ray has "
            f"{cpus:g} CPUs and {gpus:g} GPUs; reduce sweep.resources.parallel_folds, .nodes, "
            ".cpus or .gpus"
        )
    return min(fitting, config.max_concurrent or fitting)


def count_parallel_folds(settings: SweepSettings) -> int:
    """How many folds of a trial run at the same time."""
    folds = len(settings.sweep.folds)
    return min(folds, settings.sweep.resources.parallel_folds or folds)


def run_open_trials(driver: SweepDriver) -> int:
    """Run all trials that are not closed. Needs a running Ray.

    Returns:
        How many folds ran at the same time, when every trial is closed.

    Raises:
        UserError: A trial needs more than the cluster has.
        RunFailed: Ray Tune ended with an error.
    """
    settings = driver.settings
    resources, available = settings.sweep.resources, ray.cluster_resources()
    concurrent = count_concurrent_trials(settings, available.get("CPU", 0), available.get("GPU", 0))
    bundle = {"CPU": float(resources.cpus)}
    if resources.gpus:
        bundle["GPU"] = resources.gpus
    # The first bundle is that of the trial itself, which only waits for its folds.
    parts = count_parallel_folds(settings) * resources.nodes
    bundles: list[dict[str, float]] = [{}, *([bundle] * parts)]
    scheduler = JournalScheduler(driver) if driver.decides_in_groups else JournalAsha(driver)
    tuner = tune.Tuner(
        tune.with_resources(run_trial, tune.PlacementGroupFactory(bundles)),
        tune_config=tune.TuneConfig(
            search_alg=JournalSearch(driver),
            scheduler=scheduler,
            num_samples=-1,  # the search ends the sweep
            max_concurrent_trials=concurrent,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(driver.folder / ".ray"),
            failure_config=tune.FailureConfig(max_failures=settings.sweep.max_failures),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except (TuneError, RayError) as error:
        last = str(error).strip().splitlines()[-1]
        # Ray wraps the errors of the scheduler; the message after the class name is this project's.
        own_message = last.partition(f"{RunFailed.__name__}: ")[2]
        raise RunFailed(
            own_message or f"Ray Tune ended: {last[:300]}; run the same line again to continue"
        ) from error
    return concurrent * count_parallel_folds(settings)
