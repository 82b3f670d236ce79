"""Describe a mistake in the settings in one line: where it was set, key, value, what is allowed.

pydantic's own messages span several lines and name Python types. `load_settings` raises these lines
as `UserError`.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from liverseg_dist.config.describe import describe_keys
from liverseg_dist.texts.suggestions import suggest_name

KEYS_OF_OTHER_PROGRAMS = {
    "lr": "learning_rate",
    "batch_size": "global_batch_size",
    "patch": "patch_size",
    "spacing": "spacing_mm",
    "steps": "max_steps",
    "iterations": "max_steps",
    "wd": "weight_decay",
    "amp": "precision",
    "num_workers": "workers",
    "tta": "mirror",
}
"""Last part of a key in other programs -> last part of the key here, for suggestions."""
MAX_SHOWN_CHARACTERS = 100
VALIDATOR_ERRORS = ("value_error", "assertion_error")
"""Types of errors whose message was written by a validator of this project."""
REASONS = {
    "tuple_type": "not a list",
    "list_type": "not a list",
    "too_short": "too few items",
    "too_long": "too many items",
    "int_type": "not a whole number",
    "int_parsing": "not a whole number",
    "int_from_float": "not a whole number",
    "int_parsing_size": "too large",
    "float_type": "not a number",
    "float_parsing": "not a number",
    "finite_number": "not a finite number",
    "bool_type": "neither true nor false",
    "bool_parsing": "neither true nor false",
    "path_type": "not a path",
    "string_type": "not a text",
    "literal_error": "not one of the choices",
    "model_type": "not a mapping of settings",
    "model_attributes_type": "not a mapping of settings",
    "dict_type": "not a mapping",
}
"""Type of pydantic's error -> reason without Python terms."""


def describe_mistake(
    error: ValidationError, origin: Mapping[str, str], kind: type[BaseModel]
) -> str:
    """Describe the first error in one line.

    Args:
        error: errors that pydantic found.
        origin: file, or "command line", by dotted key.
        kind: the model that was validated.
    """
    problems = error.errors(include_url=False)
    problem = problems[0]
    names, places, section = _locate(problem["loc"], kind)
    # For a union, pydantic lists an error per member; the one of a validator is the most specific.
    for other in problems[1:]:
        if other["type"] in VALIDATOR_ERRORS and _locate(other["loc"], kind)[0] == names:
            problem = other
            break
    key = ".".join(names) or "settings"
    where = _find_origin(key, origin)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key {key}; {_suggest_key(names, kind)}"
    if problem["type"] == "missing" and places:
        return f"{where}: {key}: too few items{_describe_expected(key, kind)}"
    if problem["type"] == "missing":
        return f"{where}: {key} is not set, and has no default{_describe_expected(key, kind)}"
    value = problem.get("input")
    if problem["type"] in VALIDATOR_ERRORS:
        message = problem["msg"].removeprefix("Value error, ")
        shown = "" if isinstance(value, (dict, BaseModel)) else f" = {_shorten(value)}"
        return f"{where}: {key}{shown}: {message[:1].lower()}{message[1:]}"
    if section is not None and not places:
        example = next(iter(section.model_fields), "")
        return (
            f"{where}: {key} = {_shorten(value)}: this is a section of settings; set one of them, "
            f"e.g. {key}.{example}"
        )
    item = "".join(f", item {place + 1}" for place in places)
    reason = _describe_reason(problem)
    return f"{where}: {key}{item} = {_shorten(value)}: {reason}{_describe_expected(key, kind)}"


def _find_origin(key: str, origin: Mapping[str, str]) -> str:
    """Return where a key, or the nearest section that contains it, was set."""
    parts = key.split(".")
    for count in range(len(parts), 0, -1):
        prefix = ".".join(parts[:count])
        if prefix in origin:
            return origin[prefix]
    return "settings"


def _locate(
    loc: tuple[int | str, ...], kind: type[BaseModel]
) -> tuple[list[str], list[int], type[BaseModel] | None]:
    """Split an error's location, to which pydantic appends members of unions.

    Returns:
        Parts of the dotted key (up to the last known field), indices within its value, and the
        section if the key names one.
    """
    names: list[str] = []
    section: type[BaseModel] | None = kind
    for part in loc:
        if section is None or not isinstance(part, str):
            break
        names.append(part)
        field = section.model_fields.get(part)
        annotation = field.annotation if field else None
        is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        section = annotation if is_section else None  # type: ignore[assignment]
    places = [part for part in loc[len(names) :] if isinstance(part, int)]
    return names, places, section


def _suggest_key(names: list[str], kind: type[BaseModel]) -> str:
    """Suggest a key for an unknown one, or list the keys of its section."""
    parent: Any = kind
    for name in names[:-1]:
        parent = parent.model_fields[name].annotation
    fields = list(parent.model_fields)
    from_other_program = KEYS_OF_OTHER_PROGRAMS.get(names[-1], "")
    in_section = from_other_program in fields
    close = from_other_program if in_section else suggest_name(names[-1], fields)
    if close:
        return f"did you mean {'.'.join([*names[:-1], close])}?"
    # The key may be right and its section wrong: patch_size instead of data.patch_size.
    ending = f".{from_other_program or names[-1]}"
    for key in _describe_all_keys(kind):
        if key.endswith(ending):
            return f"did you mean {key}?"
    listing = f"liverseg settings {'.'.join(names[:-1])}".rstrip()
    return f"known here: {', '.join(fields)}; see {listing}"


def _describe_all_keys(kind: type[BaseModel]) -> dict[str, dict[str, Any]]:
    try:
        defaults = kind().model_dump(mode="json")
    # A model with required sections has no default instance: the schema has the other defaults.
    except ValidationError:
        defaults = {}
    return dict(describe_keys(kind, defaults))


def _describe_expected(key: str, kind: type[BaseModel]) -> str:
    """Describe the allowed values of a key, with its default as an example."""
    described = _describe_all_keys(kind).get(key)
    if described is None:
        return ""
    default = described["default"]
    expected = f"; expected {described['kind']}"
    if default is None:
        return f"{expected} (default: null)"
    text = default if isinstance(default, str) else json.dumps(default, separators=(",", ":"))
    return f"{expected}, e.g. {key}={text}" if len(text) <= MAX_SHOWN_CHARACTERS else expected


def _describe_reason(problem: Any) -> str:
    if problem["type"] in REASONS:
        return REASONS[problem["type"]]
    message = problem["msg"].removeprefix("Input ")
    return f"{message[:1].lower()}{message[1:]}".replace("should be", "must be")


def _shorten(value: object) -> str:
    text = repr(value) if isinstance(value, str) else _to_json(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]} ..."


def _to_json(value: object) -> str:
    try:
        return json.dumps(value, default=str)
    # A number with more digits than Python formats, or a very deep nesting.
    except (ValueError, RecursionError):
        return type(value).__name__
