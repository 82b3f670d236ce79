"""Tell what can be set, with defaults, choices and meaning.

  liverseg settings                 the sections
  liverseg settings train           a section, or a single key: train.schedule.name
  liverseg settings --find spacing  keys whose name or meaning has that word
  liverseg settings --configs       the config files that come with the program, with their paths

In a YAML file they are nested, on the line they follow a command: train.learning_rate=1e-3. Those of sweeps:
python -m launch.tune --help.
"""

import argparse
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from liverseg_dist.config import Settings
from liverseg_dist.config.shipped import list_shipped_configs
from liverseg_dist.errors import UserError

WIDTH = 110
LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
Schema = Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", nargs="?", default="", metavar="KEY", help="a section or a key")
    parser.add_argument(
        "--find", metavar="WORD", help="only keys whose name or meaning has this word"
    )
    parser.add_argument("--configs", action="store_true", help="list the shipped config files")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.configs:
        return {"configs": _print_shipped_configs()}
    found = dict(_keys(Settings.model_json_schema()))
    if args.prefix:
        found = {
            key: told
            for key, told in found.items()
            if f"{key}.".startswith(f"{args.prefix.rstrip('.')}.")
        }
        if not found:
            raise UserError(
                f"{args.prefix}: no such setting; `liverseg settings` lists the sections"
            )
    if args.find:
        word = args.find.lower()
        found = {
            key: told for key, told in found.items() if word in f"{key} {told['meaning']}".lower()
        }
        if not found:
            raise UserError(f"--find {args.find}: no key and no meaning has this word")
    if args.prefix or args.find:
        for key, told in found.items():
            print(f"{key} = {_as_yaml(told['default'])}   ({told['kind']})")
            for line in textwrap.wrap(told["meaning"], WIDTH - 4):
                print(f"    {line}")
    else:
        sections = sorted({key.partition(".")[0] for key in found})
        for section in sections:
            names = [key.partition(".")[2] for key in found if key.startswith(f"{section}.")]
            print(
                f"{section:12}{textwrap.shorten(', '.join(names), WIDTH - 12, placeholder=' ...')}".rstrip()
            )
        print("liverseg settings SECTION tells defaults, choices and meaning")
    return {"settings": found}


def _print_shipped_configs() -> dict[str, str]:
    """Print each file's name for --config, its path and the first line of its comment."""
    found = {}
    for path in list_shipped_configs():
        name = f"configs/{path.name}"
        found[name] = str(path)
        title = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        print(f"{name}\n    {title}\n    {path}")
    return found


def _keys(schema: Schema) -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted key, default, kind and meaning) of each single setting, in the order of the code."""
    definitions: Schema = schema.get("$defs", {})

    def walk(
        section: Schema, prefix: str, defaults: Schema
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, told in section["properties"].items():
            inner = definitions.get(str(told.get("$ref", "")).rpartition("/")[2])
            default = defaults.get(name, told.get("default"))
            if inner is not None and "properties" in inner:
                yield from walk(inner, f"{prefix}{name}.", default or {})
            else:
                meaning = " ".join(str(told.get("description", "")).split())
                yield (
                    f"{prefix}{name}",
                    {"default": default, "kind": _kind(told, definitions), "meaning": meaning},
                )

    yield from walk(schema, "", Settings().model_dump(mode="json"))


def _as_yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _kind(told: Schema, definitions: Schema) -> str:
    """What a value may be, in a few words."""
    if "$ref" in told:
        return _kind(definitions[told["$ref"].rpartition("/")[2]], definitions)
    if "enum" in told:
        return " | ".join(map(str, told["enum"]))
    if "const" in told:
        return str(told["const"])
    if "anyOf" in told:
        return " or ".join(dict.fromkeys(_kind(one, definitions) for one in told["anyOf"]))
    if told.get("type") == "array":
        inner: Schema = told.get("items") or next(iter(told.get("prefixItems", [])), {})
        count = told.get("maxItems") if told.get("maxItems") == told.get("minItems") else None
        return f"list of {f'{count} ' if count else ''}{_kind(inner, definitions) if inner else 'values'}"
    if "properties" in told:
        return "{" + ", ".join(told["properties"]) + "}"
    limits = [f"{sign} {told[name]:g}" for name, sign in LIMITS.items() if name in told]
    names = {
        "integer": "whole number",
        "number": "number",
        "boolean": "true | false",
        "string": "text",
    }
    kind = (
        "path"
        if told.get("format") == "path"
        else names.get(str(told.get("type")), str(told.get("type", "value")))
    )
    return " ".join([kind, *limits])
