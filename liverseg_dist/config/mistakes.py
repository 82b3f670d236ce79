"""A mistake in the settings as one line: where it was set, key, value, what would do, with an
example.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from liverseg_dist.config.describe import describe_keys
from liverseg_dist.texts.suggestions import suggest_name

KEYS_OF_OTHER_PROGRAMS = {
    "lr": "learning_rate", "batch_size": "global_batch_size", "patch": "patch_size", "spacing": "spacing_mm",
    "steps": "max_steps", "iterations": "max_steps", "wd": "weight_decay", "amp": "precision", "num_workers": "workers",
    "tta": "mirror",
}  # fmt: skip
"""What other programs call it -> our key."""
MAX_SHOWN_CHARACTERS = 100
VALIDATOR_ERRORS = ("value_error", "assertion_error")
"""Types of problems whose message a validator of ours wrote."""


def describe_mistake(
    error: ValidationError, origin: Mapping[str, str], kind: type[BaseModel]
) -> str:
    """One line for the first problem.

    Args:
        error: What pydantic found.
        origin: File, or "command line", by dotted key.
        kind: The model that was validated.
    """
    problems = error.errors(include_url=False)
    problem = problems[0]
    names, places, section = _locate(problem["loc"], kind)
    for other in problems[1:]:  # of a union, the branch whose validator knows what is wrong
        if other["type"] in VALIDATOR_ERRORS and _locate(other["loc"], kind)[0] == names:
            problem = other
            break
    key = ".".join(names) or "settings"
    where = next(
        (origin[key[:end]] for end in _prefix_ends(key) if key[:end] in origin), "settings"
    )
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key {key}; {_suggest_key(names, kind)}"
    if problem["type"] == "missing" and places:
        return f"{where}: {key}: too few items{_expected(key, kind)}"
    if problem["type"] == "missing":
        return f"{where}: {key} is not set, and has no default{_expected(key, kind)}"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem.get("input")
    if problem["type"] in VALIDATOR_ERRORS:
        shown = "" if isinstance(value, (dict, BaseModel)) else f" = {_shown(value)}"
        return f"{where}: {key}{shown}: {message[:1].lower()}{message[1:]}"
    if section is not None and not places:
        example = next(iter(section.model_fields), "")
        return f"{where}: {key} = {_shown(value)}: this is a section of settings; set one of them, e.g. {key}.{example}"
    item = "".join(f", item {place + 1}" for place in places)
    return f"{where}: {key}{item} = {_shown(value)}: {_reason(problem)}{_expected(key, kind)}"


def _locate(
    loc: tuple[int | str, ...], kind: type[BaseModel]
) -> tuple[list[str], list[int], type[BaseModel] | None]:
    """(names of the key, indices within its value, the section if the key is one).

    pydantic appends branches of unions; the key ends at the last known field.
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
    parent: Any = kind
    for name in names[:-1]:
        parent = parent.model_fields[name].annotation
    elsewhere = KEYS_OF_OTHER_PROGRAMS.get(names[-1], "")
    close = (
        elsewhere
        if elsewhere in parent.model_fields
        else suggest_name(names[-1], list(parent.model_fields))
    )
    if close:
        return f"did you mean {'.'.join([*names[:-1], close])}?"
    # The key may be right and its section wrong: patch_size instead of data.patch_size.
    ending = f".{elsewhere or names[-1]}"
    keys = [key for key in _described(kind) if key.endswith(ending)]
    if keys:
        return f"did you mean {keys[0]}?"
    listing = f"liverseg settings {'.'.join(names[:-1])}".rstrip()
    return f"known here: {', '.join(parent.model_fields)}; see {listing}"


def _described(kind: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Empty defaults do for a model with required sections: those of the schema are taken."""
    try:
        defaults = kind().model_dump(mode="json")
    except ValidationError:
        defaults = {}
    return dict(describe_keys(kind, defaults))


def _expected(key: str, kind: type[BaseModel]) -> str:
    described = _described(kind).get(key)
    if described is None:
        return ""
    default = described["default"]
    expected = f"; expected {described['kind']}"
    if default is None:
        return f"{expected} (default: null)"
    text = default if isinstance(default, str) else json.dumps(default, separators=(",", ":"))
    return f"{expected}, e.g. {key}={text}" if len(text) <= MAX_SHOWN_CHARACTERS else expected


def _reason(problem: Any) -> str:
    """pydantic speaks of Python's types, our users of lists and numbers."""
    known = {
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
    kind = problem["type"]
    if kind in known:
        return known[kind]
    message = problem["msg"].removeprefix("Input ")
    return f"{message[:1].lower()}{message[1:]}".replace("should be", "must be")


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, str) else _as_written(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]} ..."


def _as_written(value: object) -> str:
    try:
        return json.dumps(value, default=str)
    except (ValueError, RecursionError):  # a number of many digits
        return type(value).__name__


def _prefix_ends(key: str) -> list[int]:
    return [len(key), *(i for i in range(len(key) - 1, 0, -1) if key[i] == ".")]
