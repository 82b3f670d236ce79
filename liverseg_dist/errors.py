"""Errors that a command reports in one line, and the exit codes of all programs.

0 done, 1 failed, 2 the user's mistake, 75 stopped on request (EX_TEMPFAIL: run the same line again
to continue).
"""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_RESUMABLE = 75


MAX_MESSAGE_CHARACTERS = 1000
"""Limit for messages: a name in a damaged file may be megabytes long."""


class LiversegError(Exception):
    """Base class of errors that a command prints in one line, without a traceback."""

    exit_code = EXIT_FAILED

    def __init__(self, message: object = "") -> None:
        super().__init__(_to_one_line(str(message)))


class UserError(LiversegError):
    """A mistake of the user. The message names the file, key or case, and the remedy."""

    exit_code = EXIT_USER


class RunFailed(LiversegError):
    """The work failed, for example because of a damaged file, a full disk or a lost process."""

    exit_code = EXIT_FAILED


class StopRequested(LiversegError):
    """A signal requested a stop. All work is saved, and the same command line continues it."""

    exit_code = EXIT_RESUMABLE


class RankLost(ConnectionError):
    """The connection to another rank is lost. It ends the job, and the present case is not the
    cause."""


def os_error_line(error: OSError) -> str:
    """Describe an operating-system error in one line: file, reason and remedy."""
    remedies = {
        28: "free some space and run the same line again",
        13: "check the permissions",
        30: "write elsewhere",
    }
    # The numbers are ENOSPC, EACCES and EROFS.
    remedy = remedies.get(error.errno or 0)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}" + (f"; {remedy}" if remedy else "")


def printable(name: object) -> str:
    """Make a name printable on one line.

    Bytes that are not UTF-8 become `%E9`, for example, and control characters become `?`.
    """
    text = "".join(
        f"%{ord(c) - 0xDC00:02X}" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in str(name)
    )
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(c if c.isprintable() else "?" for c in text)


def _to_one_line(message: str) -> str:
    """Make a message one printable line of limited length: it may contain text from a file."""
    # Keep the end, which has the remedy.
    if len(message) > MAX_MESSAGE_CHARACTERS:
        message = f"{message[: MAX_MESSAGE_CHARACTERS - 300]} ... {message[-290:]}"
    return printable(" ".join(message.splitlines()) if "\n" in message else message)
