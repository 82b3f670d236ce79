"""Describe settings for users: type, limits, default and meaning of each key.

The descriptions come from the typed settings themselves, so help and validation cannot differ.
`liverseg settings` and the error messages for wrong settings use this module.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
TYPE_NAMES = {
    "integer": "whole number",
    "number": "number",
    "boolean": "true | false",
    "string": "text",
}
Schema = Mapping[str, Any]
"""A part of a JSON schema, as pydantic generates it."""


def describe_keys(kind: type[BaseModel], defaults: Schema) -> Iterator[tuple[str, dict[str, Any]]]:
    """Describe each single setting, in the order of the code.

    Args:
        kind: the settings model.
        defaults: nested default values; where a value is missing, the schema's default is used.

    Yields:
        Dotted key, and a dict with `default`, `kind` and `meaning`.
    """
    schema = kind.model_json_schema()
    yield from _describe_section(schema, schema.get("$defs", {}), "", defaults)


def _describe_section(
    section: Schema, definitions: Schema, prefix: str, defaults: Schema
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, field in section["properties"].items():
        inner = definitions.get(str(field.get("$ref", "")).rpartition("/")[2])
        default = defaults.get(name, field.get("default"))
        # A reference without properties is a named type (an enumeration), not a section.
        if inner is not None and "properties" in inner:
            yield from _describe_section(inner, definitions, f"{prefix}{name}.", default or {})
        else:
            yield (
                f"{prefix}{name}",
                {
                    "default": default,
                    "kind": describe_kind(field, definitions),
                    "meaning": " ".join(str(field.get("description", "")).split()),
                },
            )


def describe_kind(field: Schema, definitions: Schema) -> str:
    """Describe the allowed values of a field, for example "whole number >= 1"."""
    if "$ref" in field:
        return describe_kind(definitions[field["$ref"].rpartition("/")[2]], definitions)
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if "anyOf" in field:
        # Members of a union may have the same description: each is listed once.
        return " or ".join(dict.fromkeys(describe_kind(one, definitions) for one in field["anyOf"]))
    if field.get("type") == "array":
        return _describe_list(field, definitions)
    if "properties" in field:
        return "{" + ", ".join(field["properties"]) + "}"
    if isinstance(field.get("additionalProperties"), Mapping):
        return f"{{name: {describe_kind(field['additionalProperties'], definitions)}}}"
    declared = str(field.get("type", "value"))
    kind = "path" if field.get("format") == "path" else TYPE_NAMES.get(declared, declared)
    for name, sign in LIMITS.items():
        if name in field:
            kind += f" {sign} {field[name]:g}"
    return kind


def _describe_list(field: Schema, definitions: Schema) -> str:
    item: Schema = field.get("items") or next(iter(field.get("prefixItems", [])), {})
    minimum, maximum = field.get("minItems"), field.get("maxItems")
    count = f"{maximum} " if maximum is not None and maximum == minimum else ""
    return f"list of {count}{describe_kind(item, definitions) if item else 'values'}"
