"""What can be set, in words: kind, limits, default and meaning of each key, from the typed
settings.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
Schema = Mapping[str, Any]


def describe_keys(kind: type[BaseModel], defaults: Schema) -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted key, default, kind and meaning) of each single setting, in the order of the code."""
    schema = kind.model_json_schema()
    definitions: Schema = schema.get("$defs", {})

    def walk(section: Schema, prefix: str, values: Schema) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, field in section["properties"].items():
            inner = definitions.get(str(field.get("$ref", "")).rpartition("/")[2])
            default = values.get(name, field.get("default"))
            if inner is not None and "properties" in inner:
                yield from walk(inner, f"{prefix}{name}.", default or {})
            else:
                meaning = " ".join(str(field.get("description", "")).split())
                described = {"default": default, "kind": describe_kind(field, definitions)}
                yield f"{prefix}{name}", {**described, "meaning": meaning}

    yield from walk(schema, "", defaults)


def describe_kind(field: Schema, definitions: Schema) -> str:
    """What a value may be, in a few words."""
    if "$ref" in field:
        return describe_kind(definitions[field["$ref"].rpartition("/")[2]], definitions)
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(describe_kind(one, definitions) for one in field["anyOf"]))
    if field.get("type") == "array":
        return _describe_list(field, definitions)
    if "properties" in field:
        return "{" + ", ".join(field["properties"]) + "}"
    limits = [f"{sign} {field[name]:g}" for name, sign in LIMITS.items() if name in field]
    names = {
        "integer": "whole number",
        "number": "number",
        "boolean": "true | false",
        "string": "text",
    }
    declared = str(field.get("type", "value"))
    kind = "path" if field.get("format") == "path" else names.get(declared, declared)
    return " ".join([kind, *limits])


def _describe_list(field: Schema, definitions: Schema) -> str:
    inner: Schema = field.get("items") or next(iter(field.get("prefixItems", [])), {})
    least, most = field.get("minItems"), field.get("maxItems")
    count = f"{most} " if most is not None and most == least else ""
    return f"list of {count}{describe_kind(inner, definitions) if inner else 'values'}"
