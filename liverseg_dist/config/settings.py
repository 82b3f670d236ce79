"""The one typed model of all settings, and how it is put together.

Defaults in code <- YAML files of differences, in order <- dotted overrides (`train.learning_rate=1e-3`).
An unknown key, a wrong type or an impossible combination is a `UserError` of one line that names the key, the value
and the remedy. The resolved settings are saved with each run.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError

from liverseg_dist.config.base import Section
from liverseg_dist.config.convert import ConvertConfig
from liverseg_dist.config.inference import InferenceConfig
from liverseg_dist.config.memory import MemoryConfig
from liverseg_dist.config.mistakes import describe_mistake
from liverseg_dist.config.model import LossConfig, ModelConfig
from liverseg_dist.config.shipped import describe_shipped_configs, find_config
from liverseg_dist.config.train import (
    CheckpointConfig,
    DataConfig,
    RunConfig,
    TrainConfig,
    ValidationConfig,
)
from liverseg_dist.errors import UserError
from liverseg_dist.texts.structured import YamlSyntaxError, check_text, parse_yaml, read_yaml_both


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


Kind = TypeVar("Kind", bound=Settings)
CONFIG_PURPOSE = "; configs/ holds examples"


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
        _merge(merged, _read_file(file, kind), str(file), origin)
    for override in overrides:
        _merge(merged, _parse_override(override, kind), "command line", origin)
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        raise UserError(describe_mistake(error, origin, kind)) from None


def _read_file(file: Path, kind: type[BaseModel]) -> dict[str, Any]:
    path = find_config(Path(file))
    if not path.exists():
        shipped = describe_shipped_configs()
        raise UserError(f"{file}: no such config file; shipped with the program: {shipped}")
    content, as_text = read_yaml_both(path, CONFIG_PURPOSE)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(
            f"{file}: a config is a mapping of sections (train: ..., data: ...), not {type(content).__name__}"
        )
    return _keep_texts(content, as_text, kind)


def _keep_texts(content: dict[str, Any], as_text: dict[str, Any], kind: Any) -> dict[str, Any]:
    """The values of a file, where paths and names are as written: YAML makes a date of 2024-11-30, false of `no`."""
    section = _section_of(kind)
    kept: dict[str, Any] = {}
    for key, value in content.items():
        field = section.model_fields.get(key) if section is not None else None
        annotation = field.annotation if field else None
        if isinstance(value, dict):
            kept[key] = _keep_texts(value, as_text[key], annotation)
        elif value is not None and not isinstance(value, list) and _takes_text(annotation):
            kept[key] = as_text[key]
        else:
            kept[key] = value
    return kept


def _parse_override(text: str, kind: type[BaseModel]) -> dict[str, Any]:
    key, equals, value_text = text.partition("=")
    if not equals or not key or key.startswith("-"):
        raise UserError(
            f"'{text}': an override is written key=value, e.g. train.learning_rate=1e-3"
        )
    try:
        value = _parse_value(value_text, _annotation_of(key, kind))
        check_text(key)
    except ValueError as error:
        raise UserError(f"'{text}': {error}") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _parse_value(text: str, annotation: Any) -> Any:
    """What the field takes: paths and names as they are written, numbers by Python's rules, the rest as YAML.

    YAML would read `no` as false, `010` as 8, `1:30` as 90, and end a path at ` #`. An empty value is null.
    """
    choices = _choices_of(annotation)
    if text == "" and NoneType in choices:
        return None
    if _takes_text(annotation):
        return check_text(text)
    if set(choices) <= {int, float, bool, NoneType} and choices:
        bare = text.strip()
        return (
            None if bare in ("null", "~") and NoneType in choices else _number_of(check_text(bare))
        )
    try:
        return parse_yaml(text)
    except YamlSyntaxError:
        return check_text(text)


def _number_of(text: str) -> Any:
    """A whole number, a number, or the text itself, which the field then refuses or takes for true or false."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:  # also: more digits than Python reads
            continue
    return text


def _annotation_of(key: str, kind: type[BaseModel]) -> Any:
    """The type of the field that a dotted key names; None for an unknown key."""
    annotation: Any = kind
    for part in key.split("."):
        section = _section_of(annotation)
        if section is None or part not in section.model_fields:
            return None
        annotation = section.model_fields[part].annotation
    return annotation


def _section_of(annotation: Any) -> type[BaseModel] | None:
    sections = (
        one
        for one in _choices_of(annotation)
        if isinstance(one, type) and issubclass(one, BaseModel)
    )
    return next(sections, None)


def _takes_text(annotation: Any) -> bool:
    """Whether the field holds a path or a free text (some words may be special), and nothing else but null."""
    choices = set(_choices_of(annotation)) - {NoneType}
    return bool(choices & {str, Path}) and choices <= {str, Path, Literal}


def _choices_of(annotation: Any) -> tuple[Any, ...]:
    """The types of a union; `Literal` stands for a choice of words."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _choices_of(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return tuple(one for part in get_args(annotation) for one in _choices_of(part))
    if origin is Literal:
        return (Literal,)
    return () if annotation is None else (annotation,)


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


def _without_folders(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _without_folders(inner, name) for name, inner in value.items()}
    if isinstance(value, Path) or (key == "store" and isinstance(value, str)):
        return Path(value).name
    return list(value) if isinstance(value, tuple) else value
