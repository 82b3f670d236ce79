"""List the settings with default, choices and meaning.

  liverseg settings                 the sections
  liverseg settings train           one section, or one key: train.schedule.name
  liverseg settings --find spacing  keys whose name or meaning contains the word
  liverseg settings --configs       config files that come with the program, with their paths

In a YAML file settings are nested; on the command line they follow the command: train.learning_rate=1e-3. In
paths ~ and $NAME are expanded; an empty value (model.pretrained=) is null. Settings of sweeps:
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
from liverseg_dist.console import write_lines
from liverseg_dist.errors import UserError
from liverseg_dist.texts.suggestions import suggest_name

WIDTH = 110


Described = dict[str, dict[str, Any]]
"""Key of a setting -> its default, kind and meaning."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", nargs="?", default="", metavar="KEY", help="a section or a key")
    parser.add_argument(
        "--find", metavar="WORD", help="only keys whose name or meaning contains this word"
    )
    parser.add_argument("--configs", action="store_true", help="list the shipped config files")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the sections, or the settings that were asked for."""
    if args.configs:
        return {"configs": _print_shipped_configs()}
    settings = dict(describe_keys(Settings, Settings().model_dump(mode="json")))
    if args.prefix:
        settings = _select_prefix(settings, args.prefix)
    if args.find:
        settings = _select_word(settings, args.find)
    if args.prefix or args.find:
        _print_settings(settings)
    else:
        _print_sections(settings)
    return {"settings": settings}


def _select_prefix(settings: Described, prefix: str) -> Described:
    start = f"{prefix.rstrip('.')}."
    # "train" selects train.* but not training.*
    selected = {key: entry for key, entry in settings.items() if f"{key}.".startswith(start)}
    if not selected:
        raise UserError(f"{prefix}: no such setting; {_suggestion(prefix)}")
    return selected


def _select_word(settings: Described, word: str) -> Described:
    selected = {}
    for key, entry in settings.items():
        if word.lower() in f"{key} {entry['meaning']}".lower():
            selected[key] = entry
    if not selected:
        raise UserError(f"--find {word}: no key and no meaning contains this word")
    return selected


def _print_settings(settings: Described) -> None:
    lines: list[str] = []
    for key, entry in settings.items():
        lines.append(f"{key} = {_as_yaml(entry['default'])}   ({entry['kind']})")
        lines += [f"    {line}" for line in textwrap.wrap(entry["meaning"], WIDTH - 4)]
    write_lines(*lines)


def _print_sections(settings: Described) -> None:
    names: dict[str, list[str]] = {}
    for key in settings:
        section, _, name = key.partition(".")
        names.setdefault(section, []).append(name)
    # Lines are cut, so that each section stays one line.
    lines: list[str] = []
    for section in sorted(names):
        listing = textwrap.shorten(", ".join(names[section]), WIDTH - 12, placeholder=" ...")
        lines.append(f"{section:12}{listing}".rstrip())
    write_lines(*lines, "liverseg settings SECTION lists defaults, choices and meaning")


def _print_shipped_configs() -> dict[str, str]:
    """Print each file's name for --config, the first line of its comment and its path."""
    paths = {}
    for path in list_shipped_configs():
        name = f"configs/{path.name}"
        paths[name] = str(path)
        # Each shipped file begins with a comment about its purpose.
        title = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        write_lines(name, f"    {title}", f"    {path}")
    return paths


def _suggestion(word: str) -> str:
    """Name the nearest key or section; the section may be missing in `word`."""
    keys = [key for key, _ in describe_keys(Settings, {})]
    # Both names and sections: `tran.steps` is one mistake away from both.
    sections = {key[:end] for key in keys for end, char in enumerate(key) if char == "."}
    close = suggest_name(word, [*keys, *sorted(sections)])
    if close is None:
        # Users type the last part of a key, or the name it has in another program.
        endings = {key.rpartition(".")[2]: key for key in reversed(keys)}
        last = word.rpartition(".")[2]
        ending = KEYS_OF_OTHER_PROGRAMS.get(last) or suggest_name(last, list(endings))
        close = endings.get(ending) if ending is not None else None
    return f"did you mean {close}?" if close else "`liverseg settings` lists the sections"


def _as_yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
