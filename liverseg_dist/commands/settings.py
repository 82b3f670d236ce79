"""Tell what can be set, with defaults, choices and meaning.

  liverseg settings                 the sections
  liverseg settings train           a section, or a single key: train.schedule.name
  liverseg settings --find spacing  keys whose name or meaning has that word
  liverseg settings --configs       the config files that come with the program, with their paths

In a YAML file they are nested, on the line they follow a command: train.learning_rate=1e-3. On the line a path is taken
as written, after ~ and $NAME are expanded; an empty value (model.pretrained=) is null. Those of sweeps:
python -m launch.tune --help.
"""

import argparse
import json
import textwrap
from typing import Any

from liverseg_dist.config import Settings
from liverseg_dist.config.describe import describe_keys
from liverseg_dist.config.mistakes import KEYS_OF_OTHER_PROGRAMS
from liverseg_dist.config.shipped import list_shipped_configs
from liverseg_dist.errors import UserError
from liverseg_dist.texts.suggestions import suggest

WIDTH = 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", nargs="?", default="", metavar="KEY", help="a section or a key")
    parser.add_argument(
        "--find", metavar="WORD", help="only keys whose name or meaning has this word"
    )
    parser.add_argument("--configs", action="store_true", help="list the shipped config files")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.configs:
        return {"configs": _print_shipped_configs()}
    found = dict(describe_keys(Settings, Settings().model_dump(mode="json")))
    if args.prefix:
        found = {
            key: told
            for key, told in found.items()
            if f"{key}.".startswith(f"{args.prefix.rstrip('.')}.")
        }
        if not found:
            raise UserError(f"{args.prefix}: no such setting; {_suggestion(args.prefix)}")
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
    """Print each file's name for --config, the first line of its comment and its path."""
    paths = {}
    for path in list_shipped_configs():
        name = f"configs/{path.name}"
        paths[name] = str(path)
        title = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        print(f"{name}\n    {title}\n    {path}")
    return paths


def _suggestion(word: str) -> str:
    """The nearest key or section, also where the section was left out."""
    keys = [key for key, _ in describe_keys(Settings, {})]
    sections = {key[:end] for key in keys for end, char in enumerate(key) if char == "."}
    close = suggest(word, [*keys, *sorted(sections)])
    if close is None:
        endings = {key.rpartition(".")[2]: key for key in reversed(keys)}
        last = word.rpartition(".")[2]
        ending = KEYS_OF_OTHER_PROGRAMS.get(last) or suggest(last, list(endings))
        close = endings.get(ending) if ending is not None else None
    return f"did you mean {close}?" if close else "`liverseg settings` lists the sections"


def _as_yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
