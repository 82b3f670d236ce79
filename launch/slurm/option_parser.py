"""The argument parser of `launch` and its commands: a mistake is one line with a suggestion.

argparse prints its usage before an error. A submission script shows that in a log of many lines,
so the parser raises `UserError`, which `launch.cli` prints as one line.
"""

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from liverseg_dist.errors import UserError
from liverseg_dist.texts.suggestions import suggest_name


class OneLineParser(argparse.ArgumentParser):
    """Raises a `UserError` of one line; for an unknown option it names the closest known one.

    Args (besides those of argparse):
        help_lines: The commands whose --help lists the options. Default: that of this parser.
        also: Option strings of other parsers that may be meant.
    """

    def __init__(
        self, *args: Any, help_lines: str = "", also: Iterable[str] = (), **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.help_lines = help_lines or f"{self.prog} --help"
        self.also = tuple(also)

    def error(self, message: str) -> NoReturn:
        if match := re.match(r"unrecognized arguments: (-\S+)", message):
            options = [*list_option_strings(self), *self.also]
            message = f"no option {match[1]}{suggest_option(match[1], options)}"
        raise UserError(f"{self.prog}: {message}; see {self.help_lines}")


def list_option_strings(parser: argparse.ArgumentParser) -> list[str]:
    """The long options that the parser's help lists."""
    shown = []
    for text, action in parser._option_string_actions.items():
        if text.startswith("--") and action.help != argparse.SUPPRESS:
            shown.append(text)
    return shown


def suggest_option(word: str, options: Sequence[str]) -> str:
    """`; did you mean --gpus-per-node?`, or an empty text."""
    name = word.partition("=")[0]
    # The beginning of an option is a better hint than a similar spelling: --gpus, --gpus-per-node.
    longer = [option for option in options if len(name) > 3 and option.startswith(name)]
    close = longer[0] if longer else suggest_name(name, options)
    return f"; did you mean {close}?" if close else ""
