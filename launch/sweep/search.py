"""Which hyperparameters come next: a pure function of the sweep's section, its seed and what the journal holds.

So an interrupted sweep proposes what it would have proposed, and there is no state of a searcher to save.
"""

import hashlib
import itertools
import json
import math
import random
import statistics
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from liverseg_dist.errors import UserError

from .journal import Trial
from .sweep_config import Dimension, SweepConfig

Params = dict[str, Any]
MANY = 10
"""Trials from which on importances are told."""
ATTEMPTS = 64
"""Draws until one is new; a space of few choices is then taken for exhausted."""


def trial_id(params: Params) -> str:
    """Equal hyperparameters, equal id, on any machine."""
    return hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:10]


def propose_params(
    sweep: SweepConfig, seed: int, number: int, history: Sequence[Trial]
) -> Params | None:
    """Hyperparameters of trial `number`, unlike all before; None when the space has no more."""
    taken = {trial.id for trial in history}
    if sweep.search == "grid":
        return next(itertools.islice(_grid_points(sweep.space), number, None), None)
    for attempt in range(ATTEMPTS):
        if sweep.search == "random":
            drawn = _random(sweep.space, random.Random(f"{seed}:{number}:{attempt}"))
        else:
            drawn = _optuna(sweep.space, seed + 1000 * number + attempt, history, sweep.objectives)
        params = _where_it_applies(sweep.space, drawn)
        if trial_id(params) not in taken:
            return params
    return None


def require_search_package(search: str) -> None:
    """Raises `UserError` when the search needs a package that is not installed."""
    if search == "optuna":
        _import_optuna()


def _random(space: dict[str, Dimension], draw: random.Random) -> Params:
    return {key: _drawn(dimension, draw) for key, dimension in space.items()}


def _drawn(dimension: Dimension, draw: random.Random) -> Any:
    if dimension.values is not None:
        return _plain(draw.choice(dimension.values))
    low, high = _bounds(dimension)
    if dimension.type == "int":
        return draw.randint(int(low), int(high))
    if dimension.type == "loguniform":
        return _rounded(math.exp(draw.uniform(math.log(low), math.log(high))))
    return _rounded(draw.uniform(low, high))


def mutate_params(sweep: SweepConfig, params: Params, draw: random.Random) -> Params:
    """A neighbour of `params`, for population-based training: see `PbtConfig`."""
    changed: Params = {}
    for key, dimension in sweep.space.items():
        anew = draw.random() < sweep.pbt.resample_share or key not in params
        changed[key] = (
            _drawn(dimension, draw)
            if anew
            else _nearby(dimension, params[key], sweep.pbt.factor, draw)
        )
    return _where_it_applies(sweep.space, changed)


def _nearby(dimension: Dimension, value: Any, factor: float, draw: random.Random) -> Any:
    if dimension.values is not None:
        values = [_plain(v) for v in dimension.values]
        return values[min(len(values) - 1, max(0, values.index(value) + draw.choice((-1, 1))))]
    low, high = _bounds(dimension)
    moved = min(high, max(low, value * draw.choice((factor, 1 / factor))))
    return round(moved) if dimension.type == "int" else _rounded(moved)


def _where_it_applies(space: dict[str, Dimension], drawn: Params) -> Params:
    """The draw without the hyperparameters whose conditions it does not meet."""
    params: Params = {}
    for key, dimension in space.items():
        if dimension.applies(params):
            params[key] = drawn[key]
    return params


def _grid_points(space: dict[str, Dimension]) -> Iterator[Params]:
    """Every combination once: those that differ only in what their conditions leave out are one."""
    seen = set()
    for values in itertools.product(*(_grid(dimension) for dimension in space.values())):
        params = _where_it_applies(space, dict(zip(space, values, strict=True)))
        if trial_id(params) not in seen:
            seen.add(trial_id(params))
            yield params


def _grid(dimension: Dimension) -> list[Any]:
    if dimension.values is not None:
        return [_plain(value) for value in dimension.values]
    low, high = _bounds(dimension)
    shares = [i / (dimension.points - 1) for i in range(dimension.points)]
    if dimension.type == "loguniform":
        return [_rounded(low * (high / low) ** share) for share in shares]
    values = [low + share * (high - low) for share in shares]
    return (
        sorted({round(v) for v in values})
        if dimension.type == "int"
        else [_rounded(v) for v in values]
    )


_DIRECTIONS = {"dice": "maximize", "memory_gib": "minimize", "step_s": "minimize"}


def objective_values(trial: Trial, objectives: Sequence[str]) -> list[float]:
    """Of a finished trial: mean Dice over its folds, their largest memory in GiB, their mean seconds a step."""
    folds = list(trial.rungs[-1].folds.values())
    found = {"dice": trial.rungs[-1].score}
    if "memory_gib" in objectives:
        found["memory_gib"] = max(fold["memory_gib"] for fold in folds)
    if "step_s" in objectives:
        found["step_s"] = statistics.fmean(fold["step_s"] for fold in folds)
    return [found[name] for name in objectives]


def pareto_front(trials: Sequence[Trial], objectives: Sequence[str]) -> list[Trial]:
    """Finished trials that no other one beats in one objective without losing in another; highest Dice first."""
    signs = [1 if _DIRECTIONS[name] == "maximize" else -1 for name in objectives]
    points = [
        (
            tuple(
                sign * value
                for sign, value in zip(signs, objective_values(trial, objectives), strict=True)
            ),
            trial,
        )
        for trial in trials
        if trial.state == "finished"
    ]
    front = [
        (point, trial)
        for point, trial in points
        if not any(
            other != point and all(o >= p for o, p in zip(other, point, strict=True))
            for other, _ in points
        )
    ]
    return [trial for _, trial in sorted(front, key=lambda found: (-found[0][0], found[1].number))]


def _optuna(
    space: dict[str, Dimension],
    seed: int,
    history: Sequence[Trial],
    objectives: Sequence[str] = ("dice",),
) -> Params:
    """Tree-structured Parzen estimator: Bergstra et al. 2011, as Optuna has it. Running trials count as bad ones."""
    optuna = _import_optuna()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant_liar is marked experimental
        sampler = optuna.samplers.TPESampler(seed=seed % 2**32, constant_liar=True)
    study = optuna.create_study(
        directions=[_DIRECTIONS[name] for name in objectives], sampler=sampler
    )
    states = {"finished": "COMPLETE", "pruned": "PRUNED", "replaced": "PRUNED", "failed": "FAIL"}
    for trial in history:
        known: dict[str, Any] = {
            "state": optuna.trial.TrialState[states.get(trial.state, "RUNNING")]
        }
        if trial.state == "finished":
            known["values"] = objective_values(trial, objectives)
        if len(objectives) == 1:
            known["intermediate_values"] = {rung.step: rung.score for rung in trial.rungs}
        study.add_trial(_told(optuna, space, trial, **known))
    asked = study.ask(
        {key: _distribution(optuna, dimension) for key, dimension in space.items()}
    ).params
    return {key: _from_optuna(space[key], asked[key]) for key in space}


def _told(optuna: Any, space: dict[str, Dimension], trial: Trial, **known: Any) -> Any:
    """Our trial as Optuna's, with what is known of it."""
    params = {key: _to_optuna(space[key], value) for key, value in trial.params.items()}
    ranges = {key: _distribution(optuna, space[key]) for key in params}
    return optuna.trial.create_trial(params=params, distributions=ranges, **known)


def hyperparameter_importances(
    space: dict[str, Dimension], trials: Sequence[Trial]
) -> dict[str, float] | None:
    """Each hyperparameter's share of what tells good trials from the others, highest first; their sum is 1.

    PED-ANOVA, https://arxiv.org/abs/2304.10255, over the scores at the first stop, of trials that were judged there.
    Hyperparameters that not every trial has are left out. None without Optuna or for fewer than `MANY` trials, of which
    no such thing can be said.
    """
    first = min((trial.rungs[0].step for trial in trials if trial.rungs), default=0)
    told = [trial for trial in trials if trial.rungs and trial.rungs[0].step == first]
    if len(told) < MANY:
        return None
    try:
        optuna = _import_optuna()
    except UserError:
        return None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    for trial in told:
        study.add_trial(_told(optuna, space, trial, value=trial.rungs[0].score))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the evaluator is marked experimental
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(share) for key, share in found.items()}


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError(
            "sweep.search=optuna needs Optuna: run tools/setup again, or use random or grid"
        ) from None
    return optuna


def _distribution(optuna: Any, dimension: Dimension) -> Any:
    if dimension.values is not None:  # Optuna's categories are plain scalars: give it their numbers
        return optuna.distributions.CategoricalDistribution(range(len(dimension.values)))
    low, high = _bounds(dimension)
    if dimension.type == "int":
        return optuna.distributions.IntDistribution(int(low), int(high))
    return optuna.distributions.FloatDistribution(low, high, log=dimension.type == "loguniform")


def _to_optuna(dimension: Dimension, value: Any) -> Any:
    return value if dimension.values is None else [_plain(v) for v in dimension.values].index(value)


def _from_optuna(dimension: Dimension, value: Any) -> Any:
    if dimension.values is not None:
        return _plain(dimension.values[value])
    return value if dimension.type == "int" else _rounded(value)


def _bounds(dimension: Dimension) -> tuple[float, float]:
    assert dimension.low is not None  # the model's validator saw to it
    assert dimension.high is not None
    return dimension.low, dimension.high


def _rounded(value: float) -> float:
    """Four significant digits: readable, and the same number after YAML and JSON."""
    return float(f"{value:.4g}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
