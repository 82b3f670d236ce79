"""Logging of all programs: configured once at start-up, with the rank of the process.

Modules log with `logging.getLogger(__name__)` and do not ask for the rank. `RankFilter` decides
which records of which rank are shown:

* INFO: rank 0 only. It is printed to stdout without a prefix.
* WARNING and above: every rank, on stderr, as "warning: rank 3: ..." for ranks above 0.
* DEBUG (`--verbose`): every rank, on stderr, as "debug: rank 3: ...": what differs between ranks is
  the reason to read it.
* records with `extra=ONCE`: rank 0 only, for messages that are the same on every rank.

Without `set_up_logging` (the Python interface) warnings go to stderr as Python prints them.
"""

import logging
import os
import sys

from liverseg_dist.interrupts import is_first_rank

ROOT_LOGGER = "liverseg_dist"
ONCE = {"once": True}
"""`logger.warning(..., extra=ONCE)`: all ranks log the same message; only rank 0 shows it."""


class RankFilter(logging.Filter):
    """Passes the records that this rank shows, and adds the rank to those of ranks above 0."""

    def filter(self, record: logging.LogRecord) -> bool:
        # Read at each record: in tests several jobs run in one process.
        is_rank0 = is_first_rank()
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID")
        record.rank_prefix = "" if is_rank0 else f"rank {rank}: "
        if is_rank0:
            return True
        # Facts are the same on all ranks; problems and details are not.
        return record.levelno != logging.INFO and not getattr(record, "once", False)


class StreamHandler(logging.Handler):
    """Writes INFO to stdout, all other levels to stderr.

    The streams are looked up at each record, because `streams.guard_output_streams` replaces them.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stream = sys.stdout if record.levelno == logging.INFO else sys.stderr
            print(self.format(record), file=stream, flush=True)
        except (OSError, ValueError):
            self.handleError(record)


class LineFormatter(logging.Formatter):
    """Formats "message" for INFO and "level: rank N: message" for all other levels."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        if record.levelno == logging.INFO:
            return message
        rank_prefix = getattr(record, "rank_prefix", "")
        return f"{record.levelname.lower()}: {rank_prefix}{message}"


def choose_level(*, quiet: bool, verbose: bool) -> int:
    """Return the lowest level that is shown with `--quiet`, with `--verbose`, or without them."""
    if quiet:
        return logging.WARNING
    return logging.DEBUG if verbose else logging.INFO


def set_up_logging(level: int = logging.INFO, package: str = ROOT_LOGGER) -> None:
    """Configure the loggers of a package. A second call only changes the level.

    Args:
        level: lowest level that is shown (`choose_level`).
        package: name of the package whose modules log; `launch` has another one.
    """
    logger = logging.getLogger(package)
    logger.setLevel(level)
    if any(isinstance(handler, StreamHandler) for handler in logger.handlers):
        return
    handler = StreamHandler()
    handler.setFormatter(LineFormatter())
    handler.addFilter(RankFilter())
    logger.addHandler(handler)
