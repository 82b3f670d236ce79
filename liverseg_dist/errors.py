"""What a command says when it cannot go on, and the exit code a script sees.

0 done · 1 failed · 2 the user's mistake · 75 stopped on request (EX_TEMPFAIL: run the same line again to continue).
"""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_AGAIN = 75


class LiversegError(Exception):
    """Base of the errors a command prints as one line, without a traceback."""

    exit_code = EXIT_FAILED


class UserError(LiversegError):
    """The user's mistake. The message names the file, key or case, and the remedy."""

    exit_code = EXIT_USER


class RunFailed(LiversegError):
    """The work itself failed (a corrupt file, a full disk, a lost process)."""

    exit_code = EXIT_FAILED


class StopRequested(LiversegError):
    """A signal asked for a stop; everything is saved, and the same command line continues."""

    exit_code = EXIT_AGAIN


class RankLost(ConnectionError):
    """Another rank no longer answers: no fault of the case, and the end of the job."""
