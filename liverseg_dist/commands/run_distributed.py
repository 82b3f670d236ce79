"""Run the work of a command on all ranks: connection, output of one rank, failures.

A failure is reported by one line on one rank. Tracebacks of all ranks go to files in the run
folder. All commands that divide their work among ranks use it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from liverseg_dist.console import write_error
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
    on_failure: Callable[[HeartbeatMonitor, str], None] = lambda monitor, line: None,
) -> Result:
    """Connect the ranks and call `work` on each.

    The rank that failed first prints the reason. If that rank is lost, one that waits for it prints
    it. The traceback of each rank is written to `folder`/errors/.

    Args:
        timeout_s: seconds that a collective waits for a lost rank.
        on_failure: called on every rank with the reason, except for a mistake of the user.

    Returns:
        The result of `work`; on ranks that do not print the failure, a result with "error" and
        "exit_code".

    Raises:
        UserError: a mistake of the user, on the rank that prints it.
        RunFailed: any other failure, on the rank that prints it.
    """
    with world.connected(timeout_s), HeartbeatMonitor(world, timeout_s) as monitor:
        try:
            return work(monitor)
        except Exception as error:
            is_mistake = isinstance(error, UserError)
            report = None
            if not is_mistake:
                report = write_crash_report(
                    folder, error, world.global_rank, monitor.step, monitor.samples
                )
            reason = summarize_exception(error)
            line, is_reporter = monitor.report_failure(error, reason, name_rank=not is_mistake)
            if not is_mistake:
                on_failure(monitor, line)
            if not is_reporter:
                return {"error": line, "exit_code": EXIT_USER if is_mistake else EXIT_FAILED}
            if is_mistake:
                raise
            raise RunFailed(f"{line}; details: {report}" if report else line) from error


def report_case_failure(error: LiversegError, world: World, folder: Path, name: str) -> None:
    """Print why a case failed, while the other cases continue.

    An unexpected error also gets a crash report.
    """
    write_error(error)
    cause = error.__cause__
    if cause is not None and not isinstance(cause, (LiversegError, OSError)):
        write_crash_report(folder, error, world.global_rank, -1, [name])
