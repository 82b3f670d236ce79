"""What a command writes on the terminal, besides its log: results, progress and errors.

* Results go to stdout. Nothing hides them, so that `liverseg ... > file` always has the same content.
* Progress goes to stderr. `--quiet` hides it, and only rank 0 shows it.
* Errors go to stderr, with the name of the program, so that a log of several programs is readable.

Facts and warnings are log records instead (`logging_setup`). Every line is flushed: stdout of a job
is a file, where an unflushed line would appear hours later, or after lines of stderr that follow it.
"""

import sys

from liverseg_dist.streams import discard_stdout

PROGRAM = "liverseg"


class _OutputState:
    """What the process shows. It is set once at start-up, so that no call site has to decide."""

    shows_progress = True


_state = _OutputState()


def write_lines(*lines: str) -> None:
    """Write lines of the result of a command to stdout."""
    if lines:
        print("\n".join(lines), flush=True)


def write_progress(*lines: str) -> None:
    """Write what a command is doing to stderr, unless progress is hidden."""
    if _state.shows_progress and lines:
        _write_to_stderr("\n".join(lines))


def write_error(error: object, program: str = PROGRAM) -> None:
    """Write an error to stderr as "program: error"."""
    _write_to_stderr(f"{program}: {error}")


def write_notes(*lines: str) -> None:
    """Write finished lines to stderr that belong to a result, such as the findings of a scan.

    They are not log records because they have their own prefix, and each rank writes those of its
    own cases.
    """
    if lines:
        _write_to_stderr("\n".join(lines))


def show_progress_lines(is_shown: bool) -> None:
    """Set whether the process shows progress. Call it at start-up (`--quiet`)."""
    _state.shows_progress = is_shown


def is_progress_shown() -> bool:
    """Return whether the process shows progress."""
    return _state.shows_progress


def silence_process() -> None:
    """Hide the results and the progress of this process until it ends; errors are still shown.

    For ranks above 0, which compute the same results as rank 0.
    """
    _state.shows_progress = False
    discard_stdout()


def _write_to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
