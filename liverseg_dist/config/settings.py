"""The typed model of all settings, and how it is composed.

Defaults in code <- YAML files of differences, in order <- dotted overrides
(`train.learning_rate=1e-3`). An unknown key, a wrong type or an impossible combination raises a
`UserError` of one line that names the key, the value and the remedy. Old names of renamed keys are
accepted (`aliases.py`). The resolved settings are saved with each run.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError

from liverseg_dist.config.aliases import current_key, replace_old_keys
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
    """Seed of all random numbers."""
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
        """Return all settings as YAML; `load_settings` reads it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def to_public_yaml(self) -> str:
        """Return all settings as YAML without the folders of paths and URLs, for TensorBoard."""
        return yaml.safe_dump(_without_folders(self.model_dump()), sort_keys=False)


Kind = TypeVar("Kind", bound=Settings)
CONFIG_PURPOSE = "; configs/ holds examples"
"""End of the message for a file that is not YAML."""
COMMAND_LINE = "command line"


def load_settings(
    files: Sequence[Path] = (), overrides: Iterable[str] = (), *, warn_of_old_keys: bool = True
) -> Settings:
    """Combine defaults, YAML files and `key.sub=value` overrides, in this order.

    Args:
        files: YAML files of differences.
        overrides: dotted key=value pairs.
        warn_of_old_keys: log a warning for renamed keys; False for files that the program wrote.

    Raises:
        UserError: a file or a setting is wrong.
    """
    return load_settings_as(Settings, files, overrides, warn_of_old_keys=warn_of_old_keys)


def load_settings_as(
    kind: type[Kind],
    files: Sequence[Path] = (),
    overrides: Iterable[str] = (),
    *,
    warn_of_old_keys: bool = True,
) -> Kind:
    """Load settings for a program with sections of its own: `kind` adds them to `Settings`.

    Arguments and errors are those of `load_settings`.
    """
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for file in files:
        content = _read_file(file, kind)
        replace_old_keys(content, str(file), warn=warn_of_old_keys)
        _merge(merged, content, str(file), origin)
    for override in overrides:
        content = _parse_override(override, kind)
        replace_old_keys(content, COMMAND_LINE, warn=warn_of_old_keys)
        _merge(merged, content, COMMAND_LINE, origin)
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
            f"{file}: a config is a mapping of sections (train: ..., data: ...), not "
            f"{type(content).__name__}"
        )
    return _keep_texts(content, as_text, kind)


def _keep_texts(content: dict[str, Any], as_text: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Use the literal text of a YAML file for paths and names.

    YAML would convert the folder name 2024-11-30 into a date and `no` into false.

    Args:
        content: values as YAML converts them.
        as_text: the same mapping with scalars as written.
        kind: type of the section.
    """
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
    """Convert `a.b=value` into `{"a": {"b": value}}`."""
    key, equals, value_text = text.partition("=")
    if not equals or not key or key.startswith("-"):
        raise UserError(
            f"'{text}': an override is written key=value, e.g. train.learning_rate=1e-3"
        )
    try:
        value = _parse_value(value_text, _annotation_of(current_key(key), kind))
        check_text(key)
    except ValueError as error:
        raise UserError(f"'{text}': {error}") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _parse_value(text: str, annotation: Any) -> Any:
    """Convert the text of an override to what the field accepts. An empty text is null.

    Paths and names are taken as written, numbers are parsed as in Python, all else as YAML. YAML
    alone would read `no` as false, `010` as 8, `1:30` as 90, and end a path at ` #`.
    """
    choices = _choices_of(annotation)
    if text == "" and NoneType in choices:
        return None
    if _takes_text(annotation):
        return check_text(text)
    is_scalar = bool(choices) and set(choices) <= {int, float, bool, NoneType}
    if is_scalar:
        stripped = text.strip()
        if stripped in ("null", "~") and NoneType in choices:
            return None
        return _parse_number(check_text(stripped))
    try:
        return parse_yaml(text)
    except YamlSyntaxError:
        return check_text(text)


def _parse_number(text: str) -> Any:
    """Return an integer, a float, or the text itself, which the field then validates."""
    for kind in (int, float):
        try:
            return kind(text)
        # Also raised for integers with more digits than Python parses.
        except ValueError:
            continue
    return text


def _annotation_of(key: str, kind: type[BaseModel]) -> Any:
    """Return the type of the field with a dotted key; None for an unknown key."""
    annotation: Any = kind
    for part in key.split("."):
        section = _section_of(annotation)
        if section is None or part not in section.model_fields:
            return None
        annotation = section.model_fields[part].annotation
    return annotation


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the first section among the types of an annotation."""
    for choice in _choices_of(annotation):
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            return choice
    return None


def _takes_text(annotation: Any) -> bool:
    """Return whether the field is a path or free text (perhaps with special words) or null."""
    choices = set(_choices_of(annotation)) - {NoneType}
    return bool(choices & {str, Path}) and choices <= {str, Path, Literal}


def _choices_of(annotation: Any) -> tuple[Any, ...]:
    """List the types of a union; `Literal` itself stands for a choice of words."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _choices_of(get_args(annotation)[0])
    if origin in (Union, UnionType):
        choices: list[Any] = []
        for member in get_args(annotation):
            choices += _choices_of(member)
        return tuple(choices)
    if origin is Literal:
        return (Literal,)
    return () if annotation is None else (annotation,)


def _merge(
    into: dict[str, Any], new: dict[str, Any], source: str, origin: dict[str, str], prefix: str = ""
) -> None:
    """Merge nested mappings in place and record the source of each key in `origin`."""
    for key, value in new.items():
        path = f"{prefix}{key}"
        origin[path] = source
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, source, origin, f"{path}.")
            continue
        into[key] = value
        if isinstance(value, dict):
            _record_origin(value, source, origin, f"{path}.")


def _record_origin(value: dict[str, Any], source: str, origin: dict[str, str], prefix: str) -> None:
    for key, inner in value.items():
        origin[f"{prefix}{key}"] = source
        if isinstance(inner, dict):
            _record_origin(inner, source, origin, f"{prefix}{key}.")


def _without_folders(value: Any, key: str = "") -> Any:
    """Replace paths, and the URL of the store, by their last part."""
    if isinstance(value, dict):
        return {name: _without_folders(inner, name) for name, inner in value.items()}
    if isinstance(value, Path) or (key == "store" and isinstance(value, str)):
        return Path(value).name
    return list(value) if isinstance(value, tuple) else value
