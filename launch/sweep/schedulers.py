"""Schedulers for Ray that decide about trials and write each decision to the journal first.

ASHA is Ray's (Li et al. 2020, https://arxiv.org/abs/1810.05934). With several trials at the same
time its decisions depend on the order in which they reach a rung, as in any asynchronous halving.
With one trial at a time (`sweep.max_concurrent=1`) they are reproducible.
Hyperband and PBT (`generations`) wait for a whole group. For them one trial of Ray is the part of a
trial between two rungs.
"""

import json
import math
from pathlib import Path
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from liverseg_dist.errors import RunFailed

from .journal import Rung, Trial
from .ray_cluster import HOW_TO_CONTINUE, has_live_nodes
from .sweep_driver import SweepDriver

OWNER_LOST = "its owner has died"
"""Ray's error of a trial when the node of the driver is lost, which is no failure of the trial."""
MAX_REASON_CHARACTERS = 300


class JournalScheduler(FIFOScheduler):
    """Every trial runs to its next stop, and waits there for the decision about its group."""

    def __init__(self, driver: SweepDriver) -> None:
        super().__init__()
        self._driver = driver
        self._trial_ids: dict[str, str] = {}
        """Ray's trial id -> id in the journal."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._trial_ids[trial.trial_id] = trial.config["trial"]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        journal_trial = self._driver.journal.trials[result["trial"]]
        if "failed" in result:
            self._driver.record_failure(journal_trial, result["failed"])
            return str(TrialScheduler.STOP)
        step = result["step"]
        # After an interruption a trial reports again what the journal has already.
        if any(rung.step == step for rung in journal_trial.rungs):
            return str(TrialScheduler.CONTINUE)
        if step == self._driver.settings.stops[-1]:
            decision = "end"
        else:
            decision = self.choose_decision(tune_controller, trial, step, result["score"])
        folds = json.loads(result["folds"])
        rung = Rung.from_folds(step, folds, decision, result["seconds"])
        self._driver.record_rung(journal_trial, rung)
        return str(TrialScheduler.CONTINUE if decision == "continue" else TrialScheduler.STOP)

    def choose_decision(self, tune_controller: Any, trial: Any, step: int, score: float) -> str:
        """The decision at a rung: continue, prune or wait."""
        return "wait"

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Record a trial whose process Ray does not restart any more."""
        journal_trial = self._driver.journal.trials[self._trial_ids[trial.trial_id]]
        lines: list[str] = []
        file = Path(trial.error_file or "")
        if file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace")
            lines = [line.strip() for line in text.split("\n") if line.strip()]
        if not has_live_nodes() or any(OWNER_LOST in line for line in lines):
            raise RunFailed(f"Ray has lost the node of this process; {HOW_TO_CONTINUE}")
        reason = lines[-1][:MAX_REASON_CHARACTERS] if lines else "without a message"
        self._driver.record_failure(journal_trial, f"its Ray process ended: {reason}")


class JournalAsha(JournalScheduler):
    """Ray's ASHA over the numbers of the rungs, with the scores of the journal.

    The numbers take the place of steps, so that the rungs can have any distance.
    """

    def __init__(self, driver: SweepDriver) -> None:
        super().__init__(driver)
        factor, rungs = driver.settings.sweep.reduction_factor, driver.settings.sweep.rungs
        self._budgets = {step: factor**number for number, step in enumerate(rungs)}
        # max_t is between the last rung and the next one: Ray counts
        # floor(log(max_t) / log(factor)) + 1 rungs.
        self._asha = ASHAScheduler(
            "budget",
            "score",
            "max",
            max_t=math.ceil(factor ** max(0, len(rungs) - 1) * 1.1),
            grace_period=1,
            reduction_factor=factor,
        )
        for trial in driver.journal.trials.values():
            self._add_scores(trial, trial.id)

    def _add_scores(self, trial: Trial, name: str) -> None:
        """Enter the scores of a trial into Ray's rungs under this name."""
        scores: dict[float, float] = {}
        for rung in trial.rungs:
            if rung.step in self._budgets:
                scores[self._budgets[rung.step]] = rung.score
        for milestone, recorded in self._asha._brackets[0]._rungs:
            recorded.pop(trial.id, None)
            for budget, score in scores.items():
                # Ray computes its milestones with rounding errors.
                if abs(milestone - budget) < 1e-6 * budget:
                    recorded[name] = score

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        self._asha.on_trial_add(tune_controller, trial)
        self._add_scores(self._driver.journal.trials[trial.config["trial"]], trial.trial_id)

    def choose_decision(self, tune_controller: Any, trial: Any, step: int, score: float) -> str:
        result = {"budget": self._budgets[step], "score": score}
        action = self._asha.on_trial_result(tune_controller, trial, result)
        return "prune" if action == TrialScheduler.STOP else "continue"
