"""The one typed model of all settings, and how it is put together.

Defaults in code <- YAML files of differences, in order <- dotted overrides (`train.learning_rate=1e-3`).
An unknown key, a wrong type or an impossible combination is a `UserError` of one line that names the key, the value
and the remedy. The resolved settings are saved with each run.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError

from liverseg_dist.config.base import Section
from liverseg_dist.config.convert import ConvertConfig
from liverseg_dist.config.inference import InferenceConfig
from liverseg_dist.config.memory import MemoryConfig
from liverseg_dist.config.model import LossConfig, ModelConfig
from liverseg_dist.config.shipped import describe_shipped_configs, find_config
from liverseg_dist.config.train import (
    CheckpointConfig,
    DataConfig,
    RunConfig,
    TrainConfig,
    ValidationConfig,
)
from liverseg_dist.config.yaml_text import NotYaml, check_text, parse_yaml, read_yaml
from liverseg_dist.errors import UserError


class Settings(Section):
    """All settings of all commands."""

    run: RunConfig = Field(default_factory=RunConfig)
    seed: int = Field(default=0, ge=0)
    """Everything random derives from it."""
    convert: ConvertConfig = Field(default_factory=ConvertConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    inference: InferenceConfig = Field(default_factory=InferenceConfig)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def to_public_yaml(self) -> str:
        """For what is shown around (TensorBoard): of paths and URLs only the last part."""
        return yaml.safe_dump(_without_folders(self.model_dump()), sort_keys=False)


ELSEWHERE = {
    "lr": "learning_rate", "batch_size": "global_batch_size", "patch": "patch_size", "spacing": "spacing_mm",
    "steps": "max_steps", "iterations": "max_steps", "wd": "weight_decay", "amp": "precision", "num_workers": "workers",
    "tta": "mirror",
}  # fmt: skip
"""What other programs call it -> the key of ours."""
Kind = TypeVar("Kind", bound=Settings)


def load_settings(files: Sequence[Path] = (), overrides: Iterable[str] = ()) -> Settings:
    """Defaults, then each YAML file, then `key.sub=value` overrides. Raises `UserError`."""
    return load_settings_as(Settings, files, overrides)


def load_settings_as(
    kind: type[Kind], files: Sequence[Path] = (), overrides: Iterable[str] = ()
) -> Kind:
    """The same for a program with a section of its own: `kind` adds it to `Settings`."""
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for file in files:
        _merge(merged, _read_yaml(file), str(file), origin)
    for override in overrides:
        _merge(merged, _parse_override(override), "command line", origin)
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        raise UserError(_first_line(error, origin, kind)) from None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = read_yaml(find_config(Path(file)))
    except FileNotFoundError:
        shipped = describe_shipped_configs()
        raise UserError(
            f"{file}: no such config file; shipped with the program: {shipped}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(
            f"{file}: a config is a mapping of sections (train: ..., data: ...), not {type(content).__name__}"
        )
    return content


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value_text = text.partition("=")
    if not equals or not key or key.startswith("-"):
        raise UserError(
            f"'{text}': an override is written key=value, e.g. train.learning_rate=1e-3"
        )
    try:
        value = _value(value_text)
        check_text(key)
    except ValueError as error:
        raise UserError(f"'{text}': {error}") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _value(text: str) -> Any:
    """What YAML makes of it; a text that is no YAML stands for itself."""
    try:
        return parse_yaml(text)
    except NotYaml:
        return check_text(text)


def _merge(
    into: dict[str, Any], new: dict[str, Any], source: str, origin: dict[str, str], prefix: str = ""
) -> None:
    for key, value in new.items():
        path = f"{prefix}{key}"
        origin[path] = source
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, source, origin, f"{path}.")
        else:
            into[key] = value
            if isinstance(value, dict):
                _record(value, source, origin, f"{path}.")


def _record(value: dict[str, Any], source: str, origin: dict[str, str], prefix: str) -> None:
    for key, inner in value.items():
        origin[f"{prefix}{key}"] = source
        if isinstance(inner, dict):
            _record(inner, source, origin, f"{prefix}{key}.")


def _first_line(error: ValidationError, origin: dict[str, str], kind: type[Settings]) -> str:
    """One line for the first problem: where it was set, key, value, what would do."""
    problem = error.errors(include_url=False)[0]
    names: list[str] = []
    section: type[BaseModel] | None = kind
    for part in problem[
        "loc"
    ]:  # pydantic appends union branches and indices; the key ends at the last known field
        if section is None or not isinstance(part, str):
            break
        names.append(part)
        field = section.model_fields.get(part)
        annotation = field.annotation if field else None
        section = (
            annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel)
            else None
        )
    key = ".".join(names) or "settings"
    where = next(
        (origin[key[:end]] for end in _prefix_ends(key) if key[:end] in origin), "settings"
    )
    if problem["type"] == "extra_forbidden":
        parent: Any = kind
        for name in names[:-1]:
            parent = parent.model_fields[name].annotation
        close = [ELSEWHERE[names[-1]]] if ELSEWHERE.get(names[-1]) in parent.model_fields else []
        close = close or difflib.get_close_matches(names[-1], parent.model_fields, n=1)
        known = ".".join([*names[:-1], close[0]]) if close else None
        where_told = f"liverseg settings {'.'.join(names[:-1])}".rstrip()
        remedy = (
            f"did you mean {known}?"
            if known
            else f"known here: {', '.join(parent.model_fields)}; see {where_told}"
        )
        return f"{where}: unknown key {key}; {remedy}"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem.get("input")
    shown = "" if isinstance(value, (dict, BaseModel)) else f" = {value!r}"
    return f"{where}: {key}{shown}: {message[:1].lower()}{message[1:]}"


def _without_folders(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _without_folders(inner, name) for name, inner in value.items()}
    if isinstance(value, Path) or (key == "store" and isinstance(value, str)):
        return Path(value).name
    return list(value) if isinstance(value, tuple) else value


def _prefix_ends(key: str) -> list[int]:
    return [len(key), *(i for i in range(len(key) - 1, 0, -1) if key[i] == ".")]
