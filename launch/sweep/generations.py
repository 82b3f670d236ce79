"""The decisions of a synchronous scheduler, Hyperband or PBT, when a group has reached a step.

Pure functions of the settings and the journal. So a sweep decides the same after any number of
interruptions, and for any number of trials at the same time.
Hyperband: Li et al. 2018, https://arxiv.org/abs/1603.06560.
PBT: Jaderberg et al. 2017, https://arxiv.org/abs/1711.09846.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .journal import CLOSED_STATES, Trial
from .search import Params, mutate_params, trial_id
from .sweep_config import SweepSettings


@dataclass(frozen=True)
class Child:
    """A trial that continues from the checkpoints of another one."""

    id: str
    params: Params
    parent: str
    from_step: int


@dataclass(frozen=True)
class Decision:
    """What happens to a waiting trial."""

    trial: Trial
    decision: str
    """continue, prune or replace."""
    child: Child | None = None
    """The trial that replaces it."""


@dataclass(frozen=True)
class Bracket:
    """Trials that Hyperband compares with one another: numbers [first, first + size)."""

    first: int
    size: int
    start: int
    """Index of its first stop."""


def iterate_brackets(settings: SweepSettings) -> Iterator[Bracket]:
    """The brackets of Hyperband, without end.

    First many trials that are compared early, then fewer that are compared later, and again.
    """
    stops, factor, first = len(settings.stops), settings.sweep.reduction_factor, 0
    while True:
        for start in range(stops):
            # n = ceil((s_max + 1) / (s + 1) * eta^s) of the paper, with s = stops - 1 - start.
            size = math.ceil(stops / (stops - start) * factor ** (stops - 1 - start))
            yield Bracket(first, size, start)
            first += size


def find_bracket(settings: SweepSettings, number: int) -> Bracket:
    """The bracket of trial `number`."""
    for bracket in iterate_brackets(settings):
        if number < bracket.first + bracket.size:
            return bracket
    raise AssertionError("the brackets have no end")


def find_next_stop(settings: SweepSettings, trial: Trial) -> int:
    """The step at which a trial is compared next."""
    if settings.sweep.scheduler == "hyperband" and not trial.rungs:
        return settings.stops[find_bracket(settings, trial.number).start]
    later = [step for step in settings.stops if step > trial.step]
    return later[0]


def decide_groups(settings: SweepSettings, trials: Sequence[Trial]) -> list[Decision]:
    """The decisions for all waiting trials whose group is complete."""
    if settings.sweep.scheduler == "hyperband":
        return _decide_hyperband(settings, trials)
    return _decide_pbt(settings, trials)


def _decide_hyperband(settings: SweepSettings, trials: Sequence[Trial]) -> list[Decision]:
    """The best trials of each complete bracket continue, the others are pruned."""
    waiting_numbers = [trial.number for trial in trials if trial.state == "waiting"]
    brackets = {find_bracket(settings, number) for number in waiting_numbers}
    decisions: list[Decision] = []
    for bracket in brackets:
        # The last bracket may have fewer trials.
        end = min(bracket.first + bracket.size, settings.sweep.trials)
        members = [trial for trial in trials if bracket.first <= trial.number < end]
        if len(members) < end - bracket.first or not _have_all_arrived(members):
            continue
        waiting = _sort_by_score([trial for trial in members if trial.state == "waiting"])
        rung = settings.stops.index(waiting[0].step) - bracket.start
        reduction = settings.sweep.reduction_factor ** (rung + 1)
        kept = max(1, math.floor(len(members) / reduction))
        for place, trial in enumerate(waiting):
            decisions.append(Decision(trial, "continue" if place < kept else "prune"))
    return decisions


def _decide_pbt(settings: SweepSettings, trials: Sequence[Trial]) -> list[Decision]:
    """The worst trials of a complete population continue from the checkpoints of the best."""
    waiting = _sort_by_score([trial for trial in trials if trial.state == "waiting"])
    population = sum(not trial.parent for trial in trials)
    if not waiting or population < settings.sweep.trials or not _have_all_arrived(trials):
        return []
    share = settings.sweep.pbt.replaced_share
    # At most half: donors and replaced trials must not overlap.
    replaced = min(len(waiting) // 2, max(1, int(len(waiting) * share)))
    kept = len(waiting) - replaced
    decisions = [Decision(trial, "continue") for trial in waiting[:kept]]
    for trial in waiting[kept:]:
        # Seeded by the trial, so that the draw does not depend on the order of events.
        draw = random.Random(f"{settings.seed}:{trial.id}:{trial.step}")
        donor = draw.choice(waiting[:replaced])
        # Equal scores: there is nothing to gain from the other trial.
        if donor.score == trial.score:
            decisions.append(Decision(trial, "continue"))
            continue
        params = mutate_params(settings.sweep, donor.params, draw)
        origin = {"from": donor.id, "instead of": trial.id, "step": trial.step}
        child = Child(trial_id({**params, **origin}), params, donor.id, trial.step)
        decisions.append(Decision(trial, "replace", child))
    return decisions


def _have_all_arrived(trials: Sequence[Trial]) -> bool:
    """Whether no trial is still on its way to the stop."""
    return all(trial.state in (*CLOSED_STATES, "waiting") for trial in trials)


def _sort_by_score(trials: Sequence[Trial]) -> list[Trial]:
    """Best trial first; the earlier one of equal scores."""
    return sorted(trials, key=lambda trial: (-(trial.score or 0.0), trial.number))
