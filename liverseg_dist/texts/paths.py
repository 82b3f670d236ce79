"""Expand `~`, `~user`, `$NAME` and `${NAME}` in paths of users.

A shell does not expand them in a YAML file, nor in `run.dir=~/x` (only in an assignment at the
beginning of a line), so the program does. Paths in files that came with a data set are never
expanded, because they are untrusted.
"""

import argparse
import os
import re
import shlex
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from liverseg_dist.errors import UserError, printable

VARIABLE = re.compile(r"\$(?:(\w+)|\{([^{}]*)\})", re.ASCII)


def expand_text(text: str) -> str:
    """Expand home folder and variables. A path that exists as written keeps its `$`.

    Raises:
        ValueError: An undefined variable or an unknown user.
    """
    # `$` is a valid character in file names.
    if "$" in text and not os.path.lexists(text):
        text = VARIABLE.sub(_read_variable, text)
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = text.partition("/")[0]
        raise ValueError(f"{user}: no such user; write ./{user} for a folder of that name")
    return expanded


def expand_path(text: str | Path) -> Path:
    """`expand_text` as a `Path`."""
    return Path(expand_text(str(text)))


def expand_user_path(text: str | Path) -> Path:
    """`expand_path` for a path that a user typed.

    Raises:
        UserError: An undefined variable or an unknown user.
    """
    try:
        return expand_path(text)
    except ValueError as error:
        raise UserError(f"{printable(text)}: {error}") from None


def path_argument(text: str) -> Path:
    """Parse a path argument, as `type=` of argparse."""
    return Path(text_argument(text))


def text_argument(text: str) -> str:
    """Parse an argument that is a path or a URL, as `type=` of argparse."""
    try:
        return expand_text(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def quote_path(path: str | Path) -> str:
    """Quote a path for a command line that can be copied into a shell."""
    text = str(path)
    # A path that begins with `-` would be read as an option.
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def _read_variable(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    # An empty replacement would silently name another folder.
    if name not in os.environ:
        raise ValueError(f"the environment variable {name or '(empty)'} is not set")
    return os.environ[name]


def _expand_if_text(value: object) -> object:
    if isinstance(value, Path):
        return expand_path(value)
    return expand_text(value) if isinstance(value, str) else value


UserPath = Annotated[Path, BeforeValidator(_expand_if_text)]
"""Type of a path in the settings."""
UserPathOrUrl = Annotated[str, BeforeValidator(_expand_if_text)]
"""Type of a path in the settings that may be an fsspec URL."""
