"""What a user writes for a path: `~`, `~user`, `$NAME` and `${NAME}` are expanded, the rest stays
as written.

A shell expands these only where it sees them, and not in `run.dir=~/x` (an assignment only at a
line's beginning) nor in a YAML file. Never used for paths in files that came with a data set, which
are no user's words.
"""

import argparse
import os
import re
import shlex
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

VARIABLE = re.compile(r"\$(?:(\w+)|\{([^{}]*)\})", re.ASCII)


def expand_text(text: str) -> str:
    """The path with home and variables put in. A name that exists as written, `$` included, stays.

    Raises:
        ValueError: Naming an undefined variable or an unknown user.
    """
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


def path_argument(text: str) -> Path:
    """For argparse's `type=`."""
    return Path(text_argument(text))


def text_argument(text: str) -> str:
    """For argparse's `type=`, where a path may also be a URL."""
    try:
        return expand_text(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def quote_path(path: str | Path) -> str:
    """The path as a word of a command line that can be copied into a shell."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def _read_variable(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    if name not in os.environ:
        raise ValueError(f"the environment variable {name or '(empty)'} is not set")
    return os.environ[name]


def _expand_if_text(value: object) -> object:
    if isinstance(value, Path):
        return expand_path(value)
    return expand_text(value) if isinstance(value, str) else value


UserPath = Annotated[Path, BeforeValidator(_expand_if_text)]
"""A path in the settings."""
UserPathOrUrl = Annotated[str, BeforeValidator(_expand_if_text)]
"""A path in the settings that may be an fsspec URL."""
