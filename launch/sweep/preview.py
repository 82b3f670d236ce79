"""The text that `launch.tune` prints before a sweep, so that the user can check what it will do."""

from .ray_tune import count_parallel_folds
from .search import propose_params
from .sweep_config import Dimension, SweepSettings

PREVIEWED_TRIALS = 3


def describe_sweep(settings: SweepSettings) -> str:
    """What would be searched, for the user to check: trials, resources, search space."""
    config = settings.sweep
    resources = config.resources
    pruning = "nothing is pruned"
    if config.rungs:
        pruning = f"{config.scheduler} at steps {list(config.rungs)}"
    nodes = f" on each of {resources.nodes} nodes" if resources.nodes > 1 else ""
    lines = [
        f"{config.search} search, at most {config.trials} trials x {len(config.folds)} folds, "
        f"{settings.train.max_steps} steps; {pruning}",
        f"a fold: {resources.processes} process(es), {resources.cpus} CPU(s), "
        f"{resources.gpus:g} GPU(s){nodes}; "
        f"{count_parallel_folds(settings)} fold(s) of a trial at the same time",
    ]
    for key, dimension in config.space.items():
        lines.append(f"  {key}: {_describe_dimension(dimension)}")
    # Optuna's proposals depend on the results of earlier trials.
    if config.search != "optuna":
        for number in range(min(PREVIEWED_TRIALS, config.trials)):
            params = propose_params(config, settings.seed, number, ())
            if params:
                lines.append(f"  first trials: {params}")
    return "\n".join(lines)


def _describe_dimension(dimension: Dimension) -> str:
    """Type, range and conditions of a hyperparameter."""
    if dimension.values is not None:
        values = str(list(dimension.values))
    else:
        values = f"{dimension.low:g} to {dimension.high:g}"
    text = f"{dimension.type} {values}"
    for other, choices in dimension.when.items():
        text += f", when {other} is {' or '.join(map(str, choices))}"
    return text
