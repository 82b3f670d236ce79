"""Find the known name nearest to a misspelt one: for commands, options and settings."""

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

UNKNOWN_ARGUMENTS = "unrecognized arguments: "


def suggest_name(word: str, known: Sequence[str]) -> str | None:
    """The known name that is nearest to `word`; None if none is similar."""
    close = difflib.get_close_matches(word, known, n=1)
    return close[0] if close else None


class SuggestingParser(argparse.ArgumentParser):
    """An argument parser that suggests the nearest option for an unknown one."""

    def error(self, message: str) -> NoReturn:
        # argparse has no hook for unknown arguments other than the message.
        if message.startswith(UNKNOWN_ARGUMENTS):
            for word in message.removeprefix(UNKNOWN_ARGUMENTS).split():
                option = word.partition("=")[0]
                known = [name for name in self._option_string_actions if name.startswith("--")]
                if option.startswith("-") and (close := suggest_name(option, known)) is not None:
                    message += f"; did you mean {close}?"
                    break
        super().error(message)
