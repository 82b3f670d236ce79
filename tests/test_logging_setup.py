"""Logging: which rank shows which record, on which stream, with which prefix."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from liverseg_dist.logging_setup import ONCE, ROOT_LOGGER, StreamHandler, set_up_logging

PROGRAM = """
import logging
from liverseg_dist.logging_setup import ONCE, set_up_logging
set_up_logging(LEVEL)
set_up_logging(LEVEL)
logger = logging.getLogger("liverseg_dist.training.trainer")
logger.debug("detail")
logger.info("fact")
logger.warning("problem of this rank")
logger.warning("problem of all ranks", extra=ONCE)
logger.error("failure")
"""


def run_program(rank: str | None, level: str = "logging.INFO") -> tuple[list[str], list[str]]:
    """Return the lines of stdout and stderr of a process with this rank."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "SLURM_PROCID")}
    if rank is not None:
        environment["RANK"] = rank
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("LEVEL", level)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.splitlines(), done.stderr.splitlines()


@pytest.mark.parametrize("rank", [None, "0"], ids=["single process", "rank 0"])
def test_rank_0_shows_facts_on_stdout_and_problems_on_stderr(rank: str | None) -> None:
    out, err = run_program(rank)
    assert out == ["fact"]
    assert err == [
        "warning: problem of this rank",
        "warning: problem of all ranks",
        "error: failure",
    ]


def test_other_ranks_show_only_their_own_problems_with_the_rank() -> None:
    out, err = run_program("3")
    assert out == []
    assert err == ["warning: rank 3: problem of this rank", "error: rank 3: failure"]


def test_the_level_decides_what_is_shown() -> None:
    assert run_program("0", "logging.WARNING")[0] == []
    assert run_program("0", "logging.DEBUG")[1][0] == "debug: detail"


@pytest.fixture
def _remove_handler() -> Iterator[None]:
    logger = logging.getLogger(ROOT_LOGGER)
    before, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = before
    logger.setLevel(level)


@pytest.mark.usefixtures("_remove_handler")
def test_records_follow_streams_that_are_replaced_later(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    set_up_logging()
    handlers = logging.getLogger(ROOT_LOGGER).handlers
    assert sum(isinstance(handler, StreamHandler) for handler in handlers) == 1
    logging.getLogger("liverseg_dist.test").warning("after the replacement", extra=ONCE)
    assert capsys.readouterr().err == "warning: after the replacement\n"
