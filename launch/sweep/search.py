"""Proposes hyperparameters: a pure function of the sweep section, its seed and the journal.

So an interrupted sweep proposes what it would have proposed without the interruption, and no
searcher has a state that must be saved.
"""

import hashlib
import itertools
import json
import math
import random
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from liverseg_dist.errors import UserError

from .journal import Trial
from .sweep_config import Dimension, SweepConfig

Params = dict[str, Any]
"""Dotted settings key -> value."""
MIN_TRIALS_FOR_IMPORTANCE = 10
"""From fewer trials importances cannot be estimated."""
MAX_ATTEMPTS = 64
"""Draws until one is new; then the space counts as exhausted."""
OPTUNA_STATES = {"finished": "COMPLETE", "pruned": "PRUNED", "replaced": "PRUNED", "failed": "FAIL"}
MINIMIZED = ("memory_gib", "step_s")
"""Objectives for which a small value is good; all others are Dice."""
DICE_PREFIX = "dice_"
"""Followed by a structure: the objective is its Dice."""


def trial_id(params: Params) -> str:
    """An id that is equal for equal hyperparameters on any machine."""
    # Sorted keys: the order of the space must not matter.
    return hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:10]


def propose_params(
    config: SweepConfig, seed: int, number: int, history: Sequence[Trial]
) -> Params | None:
    """Propose the hyperparameters of a trial.

    Args:
        config: The sweep section.
        seed: The seed of the sweep.
        number: The number of the trial.
        history: All trials before it.

    Returns:
        Hyperparameters that no earlier trial has; None if the space has no more.
    """
    if config.search == "grid":
        return next(itertools.islice(_iterate_grid(config.space), number, None), None)
    taken = {trial.id for trial in history}
    for attempt in range(MAX_ATTEMPTS):
        if config.search == "random":
            draw = random.Random(f"{seed}:{number}:{attempt}")
            drawn = {key: _draw_value(dimension, draw) for key, dimension in config.space.items()}
        else:
            # A seed per trial and attempt, so that no state has to be saved.
            optuna_seed = seed + 1000 * number + attempt
            drawn = _draw_with_optuna(config.space, optuna_seed, history, config.objectives)
        params = _drop_inapplicable(config.space, drawn)
        if trial_id(params) not in taken:
            return params
    return None


def require_search_package(search: str) -> None:
    """Raise `UserError` if the search needs a package that is not installed."""
    if search == "optuna":
        _import_optuna()


def _draw_value(dimension: Dimension, draw: random.Random) -> Any:
    """A random value of a hyperparameter."""
    if dimension.values is not None:
        return _to_plain_value(draw.choice(dimension.values))
    low, high = _get_bounds(dimension)
    if dimension.type == "int":
        return draw.randint(int(low), int(high))
    if dimension.type == "loguniform":
        return _round_value(math.exp(draw.uniform(math.log(low), math.log(high))))
    return _round_value(draw.uniform(low, high))


def mutate_params(config: SweepConfig, params: Params, draw: random.Random) -> Params:
    """Change hyperparameters for population-based training: see `PbtConfig`."""
    changed: Params = {}
    for key, dimension in config.space.items():
        # The order of the conditions matters: each hyperparameter takes one number of the draw.
        if draw.random() < config.pbt.resample_share or key not in params:
            changed[key] = _draw_value(dimension, draw)
        else:
            changed[key] = _perturb_value(dimension, params[key], config.pbt.factor, draw)
    return _drop_inapplicable(config.space, changed)


def _perturb_value(dimension: Dimension, value: Any, factor: float, draw: random.Random) -> Any:
    """A value near another one: the next choice, or the number times or divided by the factor."""
    if dimension.values is not None:
        values = [_to_plain_value(v) for v in dimension.values]
        index = values.index(value) + draw.choice((-1, 1))
        return values[min(len(values) - 1, max(0, index))]
    low, high = _get_bounds(dimension)
    moved = min(high, max(low, value * draw.choice((factor, 1 / factor))))
    return round(moved) if dimension.type == "int" else _round_value(moved)


def _drop_inapplicable(space: dict[str, Dimension], drawn: Params) -> Params:
    """The draw without the hyperparameters whose conditions do not hold."""
    params: Params = {}
    for key, dimension in space.items():
        if dimension.applies(params):
            params[key] = drawn[key]
    return params


def _iterate_grid(space: dict[str, Dimension]) -> Iterator[Params]:
    """Every combination once; those that differ only in inapplicable values count as one."""
    seen = set()
    for values in itertools.product(*map(_list_grid_values, space.values())):
        params = _drop_inapplicable(space, dict(zip(space, values, strict=True)))
        if trial_id(params) not in seen:
            seen.add(trial_id(params))
            yield params


def _list_grid_values(dimension: Dimension) -> list[Any]:
    """The values of one hyperparameter in a grid."""
    if dimension.values is not None:
        return [_to_plain_value(value) for value in dimension.values]
    low, high = _get_bounds(dimension)
    values = []
    for index in range(dimension.points):
        share = index / (dimension.points - 1)
        if dimension.type == "loguniform":
            values.append(low * (high / low) ** share)
        else:
            values.append(low + share * (high - low))
    if dimension.type == "int":
        # A set, because rounding can make two values equal.
        return sorted({round(value) for value in values})
    return [_round_value(value) for value in values]


def compute_objectives(trial: Trial, objectives: Sequence[str]) -> list[float]:
    """The objectives of a finished trial.

    Returns:
        For dice the mean over folds, for dice_NAME that of one structure, for memory_gib the
        largest memory in GiB, for step_s the mean time of a step in seconds; in the given order.

    Raises:
        UserError: No fold has the Dice of a structure.
    """
    folds = list(trial.rungs[-1].folds.values())
    found = {"dice": trial.rungs[-1].score}
    if "memory_gib" in objectives:
        found["memory_gib"] = max(fold["memory_gib"] for fold in folds)
    if "step_s" in objectives:
        found["step_s"] = statistics.fmean(fold["step_s"] for fold in folds)
    for name in objectives:
        if name.startswith(DICE_PREFIX):
            found[name] = _mean_dice(folds, name.removeprefix(DICE_PREFIX))
    return [found[name] for name in objectives]


def _mean_dice(folds: Sequence[Mapping[str, float]], structure: str) -> float:
    values = [fold[structure] for fold in folds if structure in fold]
    if not values:
        raise UserError(f"sweep.objectives: no fold has a validation Dice of {structure}")
    return statistics.fmean(values)


def find_pareto_front(trials: Sequence[Trial], objectives: Sequence[str]) -> list[Trial]:
    """The finished trials that no other trial dominates, highest Dice first.

    A trial dominates another if it is better in one objective and not worse in any.
    """
    points = []
    for trial in trials:
        if trial.state == "finished":
            points.append((_to_maximized(trial, objectives), trial))
    front = []
    for point, trial in points:
        if not any(_dominates(other, point) for other, _ in points):
            front.append((point, trial))
    front.sort(key=lambda found: (-found[0][0], found[1].number))
    return [trial for _, trial in front]


def _to_maximized(trial: Trial, objectives: Sequence[str]) -> tuple[float, ...]:
    """The objectives of a trial with the sign for which larger is better."""
    values = compute_objectives(trial, objectives)
    signed = []
    for name, value in zip(objectives, values, strict=True):
        signed.append(-value if name in MINIMIZED else value)
    return tuple(signed)


def _dominates(other: tuple[float, ...], point: tuple[float, ...]) -> bool:
    return other != point and all(o >= p for o, p in zip(other, point, strict=True))


def _draw_with_optuna(
    space: dict[str, Dimension],
    seed: int,
    history: Sequence[Trial],
    objectives: Sequence[str] = ("dice",),
) -> Params:
    """Draw hyperparameters with Optuna's tree-structured Parzen estimator (Bergstra et al. 2011).

    Running trials count as bad ones, so that trials at the same time differ.
    """
    optuna = _import_optuna()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant_liar is marked as experimental
        # A seed of NumPy has 32 bits.
        sampler = optuna.samplers.TPESampler(seed=seed % 2**32, constant_liar=True)
    directions = ["minimize" if name in MINIMIZED else "maximize" for name in objectives]
    study = optuna.create_study(directions=directions, sampler=sampler)
    for trial in history:
        state = OPTUNA_STATES.get(trial.state, "RUNNING")
        results: dict[str, Any] = {"state": optuna.trial.TrialState[state]}
        if trial.state == "finished":
            results["values"] = compute_objectives(trial, objectives)
        # Optuna has no intermediate values for several objectives.
        if len(objectives) == 1:
            results["intermediate_values"] = {rung.step: rung.score for rung in trial.rungs}
        study.add_trial(_to_optuna_trial(optuna, space, trial, **results))
    # All dimensions are drawn; `_drop_inapplicable` removes some afterwards.
    ranges = {key: _to_distribution(optuna, dimension) for key, dimension in space.items()}
    drawn = study.ask(ranges).params
    return {key: _from_optuna_value(space[key], drawn[key]) for key in space}


def _to_optuna_trial(optuna: Any, space: dict[str, Dimension], trial: Trial, **results: Any) -> Any:
    """A trial of the journal as a trial of Optuna, with these results."""
    params: Params = {}
    ranges: dict[str, Any] = {}
    for key, value in trial.params.items():
        params[key] = _to_optuna_value(space[key], value)
        ranges[key] = _to_distribution(optuna, space[key])
    return optuna.trial.create_trial(params=params, distributions=ranges, **results)


def compute_importances(
    space: dict[str, Dimension], trials: Sequence[Trial]
) -> dict[str, float] | None:
    """The importance of each hyperparameter for the score at the first stop.

    PED-ANOVA, https://arxiv.org/abs/2304.10255, over the trials that were compared there.
    Hyperparameters that not every trial has are omitted.

    Args:
        space: The search space.
        trials: All trials.

    Returns:
        Key -> share, highest first; the sum is 1. None without Optuna, or for fewer than
        `MIN_TRIALS_FOR_IMPORTANCE` trials.
    """
    first = min((trial.rungs[0].step for trial in trials if trial.rungs), default=0)
    compared = [trial for trial in trials if trial.rungs and trial.rungs[0].step == first]
    if len(compared) < MIN_TRIALS_FOR_IMPORTANCE:
        return None
    try:
        optuna = _import_optuna()
    except UserError:
        return None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    for trial in compared:
        study.add_trial(_to_optuna_trial(optuna, space, trial, value=trial.rungs[0].score))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the evaluator is marked as experimental
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


def _to_distribution(optuna: Any, dimension: Dimension) -> Any:
    """The range of a hyperparameter as Optuna's distribution."""
    if dimension.values is not None:
        # Optuna's categories must be scalars, so it gets the indices of the values.
        return optuna.distributions.CategoricalDistribution(range(len(dimension.values)))
    low, high = _get_bounds(dimension)
    if dimension.type == "int":
        return optuna.distributions.IntDistribution(int(low), int(high))
    return optuna.distributions.FloatDistribution(low, high, log=dimension.type == "loguniform")


def _to_optuna_value(dimension: Dimension, value: Any) -> Any:
    if dimension.values is None:
        return value
    return [_to_plain_value(v) for v in dimension.values].index(value)


def _from_optuna_value(dimension: Dimension, value: Any) -> Any:
    if dimension.values is not None:
        return _to_plain_value(dimension.values[value])
    return value if dimension.type == "int" else _round_value(value)


def _get_bounds(dimension: Dimension) -> tuple[float, float]:
    # The validator of the model has checked them.
    assert dimension.low is not None
    assert dimension.high is not None
    return dimension.low, dimension.high


def _round_value(value: float) -> float:
    """Four significant digits: readable, and unchanged by YAML and JSON."""
    return float(f"{value:.4g}")


def _to_plain_value(value: Any) -> Any:
    """A tuple as the list that YAML and JSON have."""
    return list(value) if isinstance(value, tuple) else value
