"""The `sweep:` section of a sweep's YAML file, next to the ordinary sections that all its trials share."""

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
"""What the sweep sets itself, or what would make trials incomparable: not for the search space."""

NOT_FOR_PBT = (
    "model.",
    "data.patch_size",
    "train.optimizer",
    "train.ema_decay",
    "convert.",
    "seed",
)
"""What makes the networks or the states of two runs differ."""


class Dimension(Section):
    """One hyperparameter's range. `low` and `high` belong to it."""

    type: Literal["uniform", "loguniform", "int", "choice"]
    low: float | None = None
    high: float | None = None
    values: tuple[Any, ...] | None = None
    """choice: the values; lists are allowed (data.patch_size)."""
    points: Annotated[int, Field(ge=2)] = 3
    """Grid search: values per range, evenly (loguniform: by ratio) from low to high."""
    when: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Only searched in trials where these choices, named before in the space, have one of these values; elsewhere the
    key keeps what the file says: `when: {train.optimizer: [sgd]}`."""

    @field_validator("when", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: tuple(v) if isinstance(v, (list, tuple)) else (v,) for key, v in value.items()}

    def applies(self, params: dict[str, Any]) -> bool:
        """Whether a trial with these hyperparameters has this one too."""
        return all(key in params and params[key] in values for key, values in self.when.items())

    @model_validator(mode="after")
    def _complete(self) -> "Dimension":
        if self.type == "choice":
            if not self.values or self.low is not None or self.high is not None:
                raise ValueError("a choice has values: [...] and neither low nor high")
            return self
        if (
            self.values is not None
            or self.low is None
            or self.high is None
            or not self.low < self.high
        ):
            raise ValueError(f"{self.type} has low and high, low < high, and no values")
        if self.type == "loguniform" and self.low <= 0:
            raise ValueError("loguniform needs low > 0")
        if self.type == "int" and (self.low % 1 or self.high % 1):
            raise ValueError("int needs whole low and high")
        return self


class MetricConfig(Section):
    """A fold's score: the weighted mean of its validation Dice. A structure no validation case has is left out."""

    liver: float = Field(default=1.0, ge=0)
    tumour: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _some(self) -> "MetricConfig":
        if self.liver + self.tumour <= 0:
            raise ValueError("one of the weights must be above 0")
        return self


class FoldResources(Section):
    """What one fold's training takes on each of its nodes. CPU threads are cpus / processes for each process."""

    nodes: Positive = 1
    """More than 1: one torchrun on each of that many nodes (or on one node that has room for several)."""
    cpus: Positive = 1
    gpus: float = Field(default=0.0, ge=0)
    """Whole, or a share below 1 for several folds on one GPU; 0: CPU training."""
    processes: Positive = 1
    """More than 1: torchrun with that many ranks on a node."""
    parallel_folds: int = Field(default=0, ge=0)
    """Folds of a trial that run at once, each with the resources above; 0: all."""

    @model_validator(mode="after")
    def _fits(self) -> "FoldResources":
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
    """Of the population, at each rung: the worst go on from the checkpoints of as many of the best, one of these drawn
    for each, with hyperparameters changed as follows."""
    factor: float = Field(default=1.2, gt=1)
    """A number is multiplied or divided by this, within its range; a choice moves to the value before or after."""
    resample_share: float = Field(default=0.25, ge=0, le=1)
    """How often a hyperparameter is drawn anew from its range instead."""


class SweepConfig(Section):
    """What is searched, and how a trial is judged."""

    space: dict[str, Dimension] = Field(min_length=1)
    """Dotted key of the settings -> its range."""
    search: Literal["random", "grid", "optuna"] = "random"
    trials: Positive = 8
    """Hyperparameter settings tried at most; a grid may have fewer."""
    folds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 1, 2, 3, 4), min_length=1)
    rungs: tuple[Positive, ...] = ()
    """Steps after which the scheduler decides, on the mean over all folds; below train.max_steps. Empty: every trial
    runs to its end."""
    scheduler: Literal["asha", "hyperband", "pbt"] = "asha"
    """asha: prunes at each rung at once, compared with whoever was there before. hyperband: brackets that begin at one
    rung after the other, each decided when all its trials are there (with search=optuna: what BOHB does). pbt: the
    trials are a population; at each rung the worst go on from the checkpoints of the best, with changed
    hyperparameters. The last two decide the same for any number of trials at once."""
    reduction_factor: float = Field(default=3.0, ge=2)
    """asha, hyperband: about one in this many goes on from each rung."""
    pbt: PbtConfig = Field(default_factory=PbtConfig)
    objectives: tuple[Literal["dice", "memory_gib", "step_s"], ...] = ("dice",)
    """What is sought after: high Dice first, then little memory (rank 0's, GPU or host) or a short step, as measured.
    With more than one the outcome is a Pareto front; nothing is pruned."""
    metric: MetricConfig = Field(default_factory=MetricConfig)
    resources: FoldResources = Field(default_factory=FoldResources)
    max_concurrent: int = Field(default=0, ge=0)
    """Trials at once; 0: as many as the resources hold."""
    max_failures: int = Field(default=1, ge=0)
    """How often a failing fold is started again from its checkpoint before its trial is given up."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """A sweep with a Ray of its own ends with a word when no fold has run for so long; run it again to continue."""

    @field_validator("space", mode="before")
    @classmethod
    def _name_the_dimension(cls, space: Any) -> Any:
        if not isinstance(space, dict):
            return space
        made = {}
        for key, value in space.items():
            if str(key).startswith(OWNED_KEYS):
                raise ValueError(
                    f"{key} is not for the search: the sweep sets it, or trials could not be compared"
                )
            try:
                made[key] = (
                    value if isinstance(value, Dimension) else Dimension.model_validate(value)
                )
            except ValidationError as error:
                problem = error.errors(include_url=False)[0]
                where = ".".join([str(key), *(str(part) for part in problem["loc"])])
                raise ValueError(
                    f"{where}: {problem['msg'].removeprefix('Value error, ')}"
                ) from None
        return made

    @field_validator("space")
    @classmethod
    def _conditions_hold_somewhere(cls, space: dict[str, Dimension]) -> dict[str, Dimension]:
        before: dict[str, Dimension] = {}
        for key, dimension in space.items():
            for other, values in dimension.when.items():
                choices = before[other].values if other in before else None
                if choices is None:
                    raise ValueError(
                        f"{key}: when: {other} is no choice named before it in the space"
                    )
                if strange := [value for value in values if value not in choices]:
                    raise ValueError(
                        f"{key}: when: {other} is never {strange[0]!r}; one of {list(choices)}"
                    )
            before[key] = dimension
        return space

    @field_validator("folds", "rungs")
    @classmethod
    def _ascending(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if list(values) != sorted(set(values)):
            raise ValueError("must ascend, each once")
        return values

    @field_validator("objectives")
    @classmethod
    def _dice_first(cls, objectives: tuple[str, ...]) -> tuple[str, ...]:
        if objectives[:1] != ("dice",) or len(set(objectives)) != len(objectives):
            raise ValueError("must begin with dice and name each once, e.g. [dice, memory_gib]")
        return objectives

    @model_validator(mode="after")
    def _scheduler_fits(self) -> "SweepConfig":
        if self.scheduler != "asha" and not self.rungs:
            raise ValueError(f"scheduler {self.scheduler} decides at rungs; name some")
        if len(self.objectives) > 1 and self.rungs:
            raise ValueError(
                "several objectives are judged at the end of each trial; leave rungs empty"
            )
        if self.scheduler == "pbt":
            if self.search == "grid" or self.trials < 2:
                raise ValueError("pbt needs a population: at least 2 trials, and no grid")
            if shapes := [key for key in self.space if key.startswith(NOT_FOR_PBT)]:
                raise ValueError(
                    f"pbt cannot search {shapes[0]}: weights and optimizer state of others must fit"
                )
        return self


class SweepSettings(Settings):
    """All ordinary settings, which the trials share, and the sweep."""

    sweep: SweepConfig

    @model_validator(mode="after")
    def _rungs_before_the_end(self) -> "SweepSettings":
        rungs = self.sweep.rungs
        if rungs and rungs[-1] >= self.train.max_steps:
            raise ValueError(
                f"sweep.rungs end at {rungs[-1]}, but must stay below train.max_steps={self.train.max_steps}"
            )
        return self

    @property
    def stops(self) -> tuple[int, ...]:
        """The steps at which all folds of a trial meet: the rungs and the end."""
        return (*self.sweep.rungs, self.train.max_steps)


def trial_tree(settings: SweepSettings, params: dict[str, Any]) -> dict[str, Any]:
    """The differences from the defaults that make a trial, as a config file's content."""
    tree = settings.model_dump(mode="json", exclude_defaults=True, exclude={"sweep", "run"})
    tree.get("data", {}).pop("fold", None)
    tree.get("train", {}).pop("stop_at_step", None)
    tree.setdefault("validation", {})["every_steps"] = reduce(math.gcd, settings.stops)
    for key, value in params.items():
        node = tree
        *sections, last = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return tree


def to_yaml(tree: dict[str, Any], header: str = "") -> str:
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    return comment + yaml.safe_dump(tree, sort_keys=False)
