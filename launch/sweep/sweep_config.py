"""The `sweep:` section of the YAML file of a sweep.

The file also has the ordinary sections, which all trials share. In code, `SweepSettings` is the
whole file and `SweepConfig` its section `sweep`.
"""

import math
from functools import reduce
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from liverseg_dist.config import Settings
from liverseg_dist.config.base import Section
from liverseg_dist.config.train import Positive

OWNED_KEYS = (
    "run.",
    "data.fold",
    "data.store",
    "train.max_steps",
    "train.stop_at_step",
    "validation.",
    "sweep.",
)
"""Settings that the sweep sets itself, or that would make trials incomparable. They cannot be
searched."""

NOT_FOR_PBT = (
    "model.",
    "data.patch_size",
    "train.optimizer",
    "train.ema_decay",
    "convert.",
    "seed",
)
"""Settings for which networks or optimizer states of two runs differ in shape."""


Objective = Annotated[str, Field(pattern=r"^(dice|memory_gib|step_s|dice_.+)$")]


class Dimension(Section):
    """The range of one hyperparameter, from `low` to `high` inclusive, or its values."""

    type: Literal["uniform", "loguniform", "int", "choice"]
    low: float | None = None
    high: float | None = None
    values: tuple[Any, ...] | None = None
    """choice: the values; lists are allowed (data.patch_size)."""
    points: Annotated[int, Field(ge=2)] = 3
    """Grid search: values per range, evenly (loguniform: by ratio) from low to high."""
    when: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Searched only in trials in which these choices, named before it in the space, have one of
    these values: `when: {train.optimizer: [sgd]}`. In other trials the key keeps the value of the
    file."""

    @field_validator("when", mode="before")
    @classmethod
    def _accept_single_value(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        conditions: dict[Any, Any] = {}
        for key, choices in value.items():
            is_list = isinstance(choices, (list, tuple))
            conditions[key] = tuple(choices) if is_list else (choices,)
        return conditions

    def applies(self, params: dict[str, Any]) -> bool:
        """Whether a trial with these hyperparameters has this one too."""
        return all(key in params and params[key] in values for key, values in self.when.items())

    @model_validator(mode="after")
    def _check_range(self) -> "Dimension":
        if self.type == "choice":
            if not self.values or self.low is not None or self.high is not None:
                raise ValueError("a choice has values: [...] and neither low nor high")
            return self
        is_range = self.low is not None and self.high is not None and self.low < self.high
        if self.values is not None or not is_range:
            raise ValueError(f"{self.type} has low and high, low < high, and no values")
        assert self.low is not None
        assert self.high is not None
        if self.type == "loguniform" and self.low <= 0:
            raise ValueError("loguniform needs low > 0")
        if self.type == "int" and (self.low % 1 or self.high % 1):
            raise ValueError("int needs whole numbers for low and high")
        return self


class FoldResources(Section):
    """The resources of the training of one fold on each of its nodes.

    Each process has cpus / processes CPU threads.
    """

    nodes: Positive = 1
    """More than 1: one torchrun on each of so many nodes (or on one node with resources for
    several)."""
    cpus: Positive = 1
    gpus: float = Field(default=0.0, ge=0)
    """A whole number, or a share below 1 for several folds on one GPU; 0: CPU training."""
    processes: Positive = 1
    """More than 1: torchrun with so many ranks on a node."""
    parallel_folds: int = Field(default=0, ge=0)
    """Folds of a trial at the same time, each with the resources above; 0: all."""

    @model_validator(mode="after")
    def _check_gpus(self) -> "FoldResources":
        if self.gpus > 1 and self.gpus % 1:
            raise ValueError("gpus above 1 must be a whole number")
        if self.gpus and self.processes > max(1, self.gpus):
            raise ValueError("one process per GPU: gpus must be at least processes")
        return self

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes


class PbtConfig(Section):
    """Population-based training: Jaderberg et al. 2017, https://arxiv.org/abs/1711.09846."""

    replaced_share: float = Field(default=0.25, gt=0, le=0.5)
    """Share of the population that is replaced at each rung. The worst trials continue from the
    checkpoints of as many of the best (one of them is drawn for each), with hyperparameters changed
    as follows."""
    factor: float = Field(default=1.2, gt=1)
    """A number is multiplied or divided by this, within its range; a choice changes to the value
    before or after it."""
    resample_share: float = Field(default=0.25, ge=0, le=1)
    """Probability that a hyperparameter is drawn from its range instead."""


class SweepConfig(Section):
    """The search space, and how trials are compared."""

    space: dict[str, Dimension] = Field(min_length=1)
    """Dotted settings key -> its range."""
    search: Literal["random", "grid", "optuna"] = "random"
    trials: Positive = 8
    """At most so many hyperparameter settings are tried; a grid may have fewer."""
    folds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 1, 2, 3, 4), min_length=1)
    rungs: tuple[Positive, ...] = ()
    """Steps at which the scheduler decides, on the mean over all folds; below train.max_steps.
    Empty: every trial runs to its end."""
    scheduler: Literal["asha", "hyperband", "pbt"] = "asha"
    """asha: prunes at once at each rung, compared with the trials that reached it before.
    hyperband: brackets that start at one rung after the other, each decided when all its trials
    have arrived (with search=optuna: BOHB). pbt: the trials are a population; at each rung the
    worst continue from the checkpoints of the best, with changed hyperparameters. The last two
    decide the same for any number of trials at the same time."""
    reduction_factor: float = Field(default=3.0, ge=2)
    """asha, hyperband: about one in so many trials continues from each rung."""
    pbt: PbtConfig = Field(default_factory=PbtConfig)
    objectives: tuple[Objective, ...] = ("dice",)
    """High Dice first, then little memory (memory_gib: of rank 0, GPU or host), short steps
    (step_s), as measured, or the Dice of one structure (dice_NAME). With more than one objective
    the result is a Pareto front, and nothing is pruned."""
    metric: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Structure -> weight. The score of a fold is the weighted mean of its validation Dice; a
    structure without an entry has the weight 1. A structure that no validation case has is left
    out."""
    resources: FoldResources = Field(default_factory=FoldResources)
    max_concurrent: int = Field(default=0, ge=0)
    """Trials at the same time; 0: as many as the resources allow."""
    max_failures: int = Field(default=1, ge=0)
    """How often a failed fold is restarted from its checkpoint before its trial counts as
    failed."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """A sweep with its own local Ray ends with an error when no fold has run for so long; run it
    again to continue."""

    @field_validator("space", mode="before")
    @classmethod
    def _parse_space(cls, space: Any) -> Any:
        """Parse each dimension here, so that an error names its key."""
        if not isinstance(space, dict):
            return space
        parsed = {}
        for key, value in space.items():
            if str(key).startswith(OWNED_KEYS):
                raise ValueError(
                    f"{key} cannot be searched: the sweep sets it, or trials could not be compared"
                )
            if isinstance(value, Dimension):
                parsed[key] = value
                continue
            try:
                parsed[key] = Dimension.model_validate(value)
            except ValidationError as error:
                problem = error.errors(include_url=False)[0]
                where = ".".join([str(key), *map(str, problem["loc"])])
                message = problem["msg"].removeprefix("Value error, ")
                raise ValueError(f"{where}: {message}") from None
        return parsed

    @field_validator("space")
    @classmethod
    def _check_conditions(cls, space: dict[str, Dimension]) -> dict[str, Dimension]:
        earlier: dict[str, Dimension] = {}
        for key, dimension in space.items():
            for other, values in dimension.when.items():
                choices = earlier[other].values if other in earlier else None
                if choices is None:
                    raise ValueError(
                        f"{key}: when: {other} is not a choice named before it in the space"
                    )
                impossible = [value for value in values if value not in choices]
                if impossible:
                    raise ValueError(
                        f"{key}: when: {other} is never {impossible[0]!r}; one of {list(choices)}"
                    )
            earlier[key] = dimension
        return space

    @field_validator("folds", "rungs")
    @classmethod
    def _check_ascending(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if list(values) != sorted(set(values)):
            raise ValueError("must be in ascending order, without duplicates")
        return values

    @field_validator("objectives")
    @classmethod
    def _check_objectives(cls, objectives: tuple[str, ...]) -> tuple[str, ...]:
        if objectives[:1] != ("dice",) or len(set(objectives)) != len(objectives):
            raise ValueError("must begin with dice and name each once, e.g. [dice, memory_gib]")
        return objectives

    @model_validator(mode="after")
    def _check_scheduler(self) -> "SweepConfig":
        if self.scheduler != "asha" and not self.rungs:
            raise ValueError(f"scheduler {self.scheduler} decides at rungs; set sweep.rungs")
        if len(self.objectives) > 1 and self.rungs:
            raise ValueError(
                "several objectives are compared at the end of each trial; leave rungs empty"
            )
        if self.scheduler != "pbt":
            return self
        if self.search == "grid" or self.trials < 2:
            raise ValueError("pbt needs a population: at least 2 trials, and no grid")
        unsuitable = [key for key in self.space if key.startswith(NOT_FOR_PBT)]
        if unsuitable:
            raise ValueError(
                f"pbt cannot search {unsuitable[0]}: "
                "weights and optimizer state of other trials must fit"
            )
        return self


class SweepSettings(Settings):
    """All ordinary settings, which the trials share, and the section `sweep`."""

    sweep: SweepConfig

    @model_validator(mode="after")
    def _check_rungs(self) -> "SweepSettings":
        rungs = self.sweep.rungs
        if rungs and rungs[-1] >= self.train.max_steps:
            raise ValueError(
                f"sweep.rungs end at {rungs[-1]}, "
                f"but must stay below train.max_steps={self.train.max_steps}"
            )
        return self

    @property
    def stops(self) -> tuple[int, ...]:
        """The steps at which the folds of a trial report: the rungs and the end."""
        return (*self.sweep.rungs, self.train.max_steps)


def build_trial_config(settings: SweepSettings, params: dict[str, Any]) -> dict[str, Any]:
    """The content of the config file of a trial.

    Args:
        settings: The settings of the sweep.
        params: The hyperparameters of the trial.

    Returns:
        Section -> settings that differ from the defaults.
    """
    tree = settings.model_dump(mode="json", exclude_defaults=True, exclude={"sweep", "run"})
    # The command line of each fold sets these two.
    tree.get("data", {}).pop("fold", None)
    tree.get("train", {}).pop("stop_at_step", None)
    # Validation at every stop, and as rarely as that allows.
    tree.setdefault("validation", {})["every_steps"] = reduce(math.gcd, settings.stops)
    for key, value in params.items():
        node = tree
        *sections, last = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return tree


def to_yaml(tree: dict[str, Any], header: str = "") -> str:
    """YAML text, with the header as comment."""
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    return comment + yaml.safe_dump(tree, sort_keys=False)
