"""What a synchronous scheduler decides once all trials of a group have reached a step: Hyperband, and PBT.

Pure functions of the settings and of what the journal holds, so a sweep decides the same however often it was
interrupted and however many trials ran at once.
Hyperband: Li et al. 2018, https://arxiv.org/abs/1603.06560. PBT: Jaderberg et al. 2017, https://arxiv.org/abs/1711.09846.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .journal import SETTLED, Trial
from .search import Params, mutate_params, trial_id
from .sweep_config import SweepSettings


@dataclass(frozen=True)
class Child:
    """A trial that goes on from another one's checkpoints."""

    id: str
    params: Params
    parent: str
    from_step: int


@dataclass(frozen=True)
class Decision:
    trial: Trial
    decision: str
    child: Child | None = None


@dataclass(frozen=True)
class Bracket:
    """Trials that Hyperband compares with one another: numbers [first, first + size)."""

    first: int
    size: int
    start: int
    """Which stop is its first."""


def hyperband_brackets(sweep: SweepSettings) -> Iterator[Bracket]:
    """Without end: many trials that are judged early, then fewer that are judged late, and again."""
    stops, factor, first = len(sweep.stops), sweep.sweep.reduction_factor, 0
    while True:
        for start in range(stops):
            size = math.ceil(stops / (stops - start) * factor ** (stops - 1 - start))
            yield Bracket(first, size, start)
            first += size


def bracket_of(sweep: SweepSettings, number: int) -> Bracket:
    return next(
        bracket for bracket in hyperband_brackets(sweep) if number < bracket.first + bracket.size
    )


def next_stop(sweep: SweepSettings, trial: Trial) -> int:
    """The step at which a trial is to be judged next."""
    left = [step for step in sweep.stops if step > trial.step]
    if sweep.sweep.scheduler == "hyperband" and not trial.rungs:
        return sweep.stops[bracket_of(sweep, trial.number).start]
    return left[0]


def decide_group(sweep: SweepSettings, trials: Sequence[Trial]) -> list[Decision]:
    """For all trials that wait and whose group is complete; empty while others are still under way."""
    decide = _of_hyperband if sweep.sweep.scheduler == "hyperband" else _of_pbt
    return decide(sweep, trials)


def _of_hyperband(sweep: SweepSettings, trials: Sequence[Trial]) -> list[Decision]:
    found: list[Decision] = []
    for bracket in {
        bracket_of(sweep, trial.number) for trial in trials if trial.state == "waiting"
    }:
        last = min(bracket.first + bracket.size, sweep.sweep.trials)
        members = [trial for trial in trials if bracket.first <= trial.number < last]
        waiting = [trial for trial in members if trial.state == "waiting"]
        if len(members) < last - bracket.first or any(
            t.state not in (*SETTLED, "waiting") for t in members
        ):
            continue
        rung = sweep.stops.index(waiting[0].step) - bracket.start
        kept = max(1, math.floor(len(members) / sweep.sweep.reduction_factor ** (rung + 1)))
        ranked = _best_first(waiting)
        found += [
            Decision(trial, "continue" if place < kept else "prune")
            for place, trial in enumerate(ranked)
        ]
    return found


def _of_pbt(sweep: SweepSettings, trials: Sequence[Trial]) -> list[Decision]:
    waiting = [trial for trial in trials if trial.state == "waiting"]
    begun = sum(not trial.parent for trial in trials)
    if (
        not waiting
        or begun < sweep.sweep.trials
        or any(t.state not in (*SETTLED, "waiting") for t in trials)
    ):
        return []
    ranked = _best_first(waiting)
    few = min(len(ranked) // 2, max(1, int(len(ranked) * sweep.sweep.pbt.replaced_share)))
    found = [Decision(trial, "continue") for trial in ranked[: len(ranked) - few]]
    for loser in ranked[len(ranked) - few :]:
        chance = random.Random(f"{sweep.seed}:{loser.id}:{loser.step}")
        donor = chance.choice(ranked[:few])
        if donor.score == loser.score:
            found.append(Decision(loser, "continue"))
            continue
        params = mutate_params(sweep.sweep, donor.params, chance)
        id_ = trial_id({**params, "from": donor.id, "instead of": loser.id, "step": loser.step})
        found.append(Decision(loser, "replace", Child(id_, params, donor.id, loser.step)))
    return found


def _best_first(trials: Sequence[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda trial: (-(trial.score or 0.0), trial.number))
