"""What a command says when it cannot go on, and the exit code a script sees.

0 done · 1 failed · 2 the user's mistake · 75 stopped on request (EX_TEMPFAIL: run the same line again to continue).
"""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_RESUMABLE = 75


MAX_MESSAGE_CHARACTERS = 1000
"""Of a message: what a damaged file calls a name may be megabytes long."""


class LiversegError(Exception):
    """Base of the errors a command prints as one line, without a traceback."""

    exit_code = EXIT_FAILED

    def __init__(self, message: object = "") -> None:
        super().__init__(_to_one_line(str(message)))


class UserError(LiversegError):
    """The user's mistake. The message names the file, key or case, and the remedy."""

    exit_code = EXIT_USER


class RunFailed(LiversegError):
    """The work itself failed (a corrupt file, a full disk, a lost process)."""

    exit_code = EXIT_FAILED


class StopRequested(LiversegError):
    """A signal asked for a stop; everything is saved, and the same command line continues."""

    exit_code = EXIT_RESUMABLE


class RankLost(ConnectionError):
    """Another rank no longer answers: no fault of the case, and the end of the job."""


def os_error_line(error: OSError) -> str:
    """File, reason and remedy."""
    remedies = {
        28: "free some space and run the same line again",
        13: "check the permissions",
        30: "write elsewhere",
    }
    remedy = remedies.get(error.errno or 0)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}" + (f"; {remedy}" if remedy else "")


def printable(name: object) -> str:
    """A name fit for one line of output: bytes that are not UTF-8 become `%E9`, control characters `?`."""
    text = "".join(
        f"%{ord(c) - 0xDC00:02X}" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in str(name)
    )
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(c if c.isprintable() else "?" for c in text)


def _to_one_line(message: str) -> str:
    """Names and values come from files: whatever they hold, a message is one printable line of readable length."""
    if len(message) > MAX_MESSAGE_CHARACTERS:  # the remedy stands at the end
        message = f"{message[: MAX_MESSAGE_CHARACTERS - 300]} ... {message[-290:]}"
    return printable(" ".join(message.splitlines()) if "\n" in message else message)
