"""Run the work of a command on all ranks: connection, output of one rank, failures.

A failure is reported by one line on one rank. Tracebacks of all ranks go to files in the run
folder. All commands that divide their work among ranks use it.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from liverseg_dist.console import write_error
from liverseg_dist.distributed.connection_errors import is_consequence
from liverseg_dist.distributed.flight_recorder import enable_flight_recorder, write_flight_record
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.process_groups import abort_process_groups, exit_after
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import EXIT_FAILED, EXIT_USER, LiversegError, RunFailed, UserError
from liverseg_dist.training.crash_report import summarize_exception, write_crash_report

Result = dict[str, Any]
TEARDOWN_LIMIT_S = 20.0
"""Time that a failed rank of several has to end after it has printed the reason."""


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
        The result of `work`; after a failure a result with "error" and "exit_code". Its reason is
        printed already, before the process group and the work are torn down.
    """
    errors = folder / "errors"
    # The record of collectives is useful only if it was switched on before the first one.
    if world.is_distributed:
        enable_flight_recorder(errors)
    with world.connected(timeout_s), HeartbeatMonitor(world, timeout_s) as monitor:
        failure = FailureReporter(world, folder, monitor, partial(on_failure, monitor))
        monitor.errors, monitor.on_error = errors, failure.report
        monitor.on_forced_end = partial(on_failure, monitor)
        try:
            return work(monitor)
        except Exception as error:
            result = failure.report(error)
            # Peers that wait in a collective would otherwise wait for its whole timeout.
            abort_process_groups()
            # The process that serves the store must live until the others have read the reason
            # from it.
            if monitor.failure is not None and world.serves_store:
                monitor.failure.wait_until_read()
            return result


class FailureReporter:
    """Prints why the work of this rank failed, once, and limits the time until its process ends."""

    def __init__(
        self,
        world: World,
        folder: Path,
        monitor: HeartbeatMonitor,
        on_failure: Callable[[str], None],
    ) -> None:
        self._world, self._folder, self._monitor = world, folder, monitor
        self._on_failure = on_failure
        self._result: Result | None = None

    def report(self, error: BaseException) -> Result:
        """Agree with the other ranks on the reason, print it on one of them, and write the reports.

        Later calls return the result of the first one: an error during the teardown is a
        consequence.
        """
        # A failing teardown must not replace the reason of the failure.
        if self._result is not None:
            return self._result
        rank, is_mistake = self._world.global_rank, isinstance(error, UserError)
        report = None
        if not is_mistake:
            samples = self._monitor.samples
            report = write_crash_report(self._folder, error, rank, self._monitor.step, samples)
        reason = summarize_exception(error)
        line, is_reporter = self._monitor.report_failure(error, reason, name_rank=not is_mistake)
        exit_code = EXIT_USER if is_mistake else EXIT_FAILED
        if is_reporter:
            # The messages of errors are limited to one printable line.
            line = str(RunFailed(f"{line}; details: {report}" if report else line))
            write_error(line)
        self._result = {"error": line, "exit_code": exit_code}
        if self._world.is_distributed:
            # NCCL's teardown can hang if one rank fails alone (pytorch/pytorch#141510), so the
            # process gets a time limit.
            exit_after(TEARDOWN_LIMIT_S, exit_code)
        if not is_mistake:
            self._on_failure(line)
            # A rank that fails because of another one records what it was waiting for.
            if is_consequence(error):
                write_flight_record(self._folder / "errors", rank)
        return self._result


def report_case_failure(error: LiversegError, world: World, folder: Path, name: str) -> None:
    """Print why a case failed, while the other cases continue.

    An unexpected error also gets a crash report.
    """
    write_error(error)
    cause = error.__cause__
    # Errors of files are complete in one line; anything else is a fault that needs a traceback.
    if cause is not None and not isinstance(cause, (LiversegError, OSError)):
        write_crash_report(folder, error, world.global_rank, -1, [name])
