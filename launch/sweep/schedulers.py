"""Ray asks what becomes of a trial; the answer is written to the journal first, and no answer is given twice.

ASHA is Ray's (Li et al. 2020, https://arxiv.org/abs/1810.05934). With several trials at once its decisions depend on
who reaches a rung first, as in any asynchronous halving; with one at a time (`sweep.max_concurrent=1`) they are
reproducible.
Hyperband and PBT (generations.py) wait for a whole group: there a trial is for Ray only what lies between two rungs.
"""

import json
import math
from pathlib import Path
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from liverseg_dist.errors import RunFailed

from .journal import Rung, Trial
from .ray_cluster import nodes_left
from .sweep_driver import Sweep

OWN_NODE_LOST = "its owner has died"
"""What Ray says of trials when the driver's node is gone: no fault of theirs."""


class JournalScheduler(FIFOScheduler):
    """Every trial runs to its next stop, and waits there when its group is decided on together."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__()
        self._sweep = sweep
        self._names: dict[str, str] = {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._names[trial.trial_id] = trial.config["trial"]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        ours = self._sweep.journal.trials[result["trial"]]
        if "failed" in result:
            self._sweep.fail(ours, result["failed"])
            return str(TrialScheduler.STOP)
        step = result["step"]
        if any(rung.step == step for rung in ours.rungs):  # told again after an interruption
            return str(TrialScheduler.CONTINUE)
        last = step == self._sweep.settings.stops[-1]
        decision = "end" if last else self.decide(tune_controller, trial, step, result["score"])
        self._sweep.record(
            ours, Rung.of(step, json.loads(result["folds"]), decision, result["seconds"])
        )
        return str(TrialScheduler.CONTINUE if decision == "continue" else TrialScheduler.STOP)

    def decide(self, tune_controller: Any, trial: Any, step: int, score: float) -> str:
        return "wait"

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Ray has given the trial's own process up, after its restarts."""
        ours = self._sweep.journal.trials[self._names[trial.trial_id]]
        file = Path(trial.error_file or "")
        lines = (
            file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else []
        )
        lines = [line for line in lines if line.strip()]
        if not nodes_left() or any(OWN_NODE_LOST in line for line in lines):
            raise RunFailed(
                "Ray has lost this process's node; all is kept, run the same line again to continue"
            )
        self._sweep.fail(
            ours, f"its Ray process ended: {lines[-1].strip()[:300] if lines else 'no word'}"
        )


class JournalAsha(JournalScheduler):
    """Ray's ASHA over rung numbers (so that rungs may lie anywhere), with its memory filled from the journal."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(sweep)
        factor, rungs = sweep.settings.sweep.reduction_factor, sweep.settings.sweep.rungs
        self._budgets = {step: factor**number for number, step in enumerate(rungs)}
        # max_t lies between the last rung and the next: Ray counts floor(log(max_t) / log(factor)) + 1 rungs
        self._asha = ASHAScheduler(
            "budget", "score", "max", max_t=math.ceil(factor ** max(0, len(rungs) - 1) * 1.1), grace_period=1,
            reduction_factor=factor,
        )  # fmt: skip
        for trial in sweep.journal.trials.values():
            self._remember(trial, trial.id)

    def _remember(self, trial: Trial, name: str) -> None:
        budgets = {
            self._budgets[rung.step]: rung.score
            for rung in trial.rungs
            if rung.step in self._budgets
        }
        for milestone, recorded in self._asha._brackets[0]._rungs:
            recorded.pop(trial.id, None)
            for budget, score in budgets.items():
                if abs(milestone - budget) < 1e-6 * budget:
                    recorded[name] = score

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        self._asha.on_trial_add(tune_controller, trial)
        self._remember(self._sweep.journal.trials[trial.config["trial"]], trial.trial_id)

    def decide(self, tune_controller: Any, trial: Any, step: int, score: float) -> str:
        asked = {"budget": self._budgets[step], "score": score}
        action = self._asha.on_trial_result(tune_controller, trial, asked)
        return "prune" if action == TrialScheduler.STOP else "continue"
