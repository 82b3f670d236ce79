"""Ranks at one job: one line tells why they end early, whichever rank it was; the whole story goes to a file."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import EXIT_FAILED, EXIT_USER, LiversegError, RunFailed, UserError
from liverseg_dist.training.crash_report import summarize_exception, write_crash_report

Result = dict[str, Any]


def run_distributed(
    world: World,
    timeout_s: float,
    folder: Path,
    work: Callable[[HeartbeatMonitor], Result],
    told: Callable[[HeartbeatMonitor, str], None] = lambda watch, line: None,
) -> Result:
    """`work`, with the ranks connected. What ends it is told by the rank that failed first (where a rank is gone, by
    one that misses it), the whole story of every rank's failure in `folder`/errors/. Raises `UserError`, `RunFailed`.

    `told` gets the line, too, on every rank, unless it is about a mistake of the user's.
    """
    with world.connected(timeout_s), HeartbeatMonitor(world, timeout_s) as watch:
        try:
            return work(watch)
        except Exception as error:
            mistake = isinstance(error, UserError)
            story = (
                None
                if mistake
                else write_crash_report(folder, error, world.global_rank, watch.step, watch.samples)
            )
            line, ours = watch.account(error, summarize_exception(error), name_rank=not mistake)
            if not mistake:
                told(watch, line)
            if not ours:
                return {"error": line, "exit_code": EXIT_USER if mistake else EXIT_FAILED}
            if mistake:
                raise
            raise RunFailed(f"{line}; the whole story: {story}" if story else line) from error


def report_case_failure(error: LiversegError, world: World, folder: Path, name: str) -> None:
    """A case that failed while the others go on: its line; its story, too, where the reason is none we know of."""
    print(f"liverseg: {error}", file=sys.stderr, flush=True)
    if error.__cause__ is not None and not isinstance(error.__cause__, (LiversegError, OSError)):
        write_crash_report(folder, error, world.global_rank, -1, [name])
