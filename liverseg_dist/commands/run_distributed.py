"""Run the work of a command on all ranks: connection, output of one rank, failures.

A failure is reported by one line on one rank. Tracebacks of all ranks go to files in the run folder. `train`, `evaluate`,
`predict` and `postprocess` use it.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from liverseg_dist.distributed.collectives import broadcast_from_rank0
from liverseg_dist.distributed.heartbeat import HeartbeatMonitor
from liverseg_dist.distributed.world import World
from liverseg_dist.errors import EXIT_FAILED, EXIT_USER, LiversegError, RunFailed, UserError
from liverseg_dist.training.crash_report import summarize_exception, write_crash_report

Result = dict[str, Any]
T = TypeVar("T")


def silence_other_ranks(world: World) -> None:
    """Discard the standard output of all ranks except rank 0, until the process ends."""
    if not world.is_main:
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115 - open until the process ends


def print_warning(world: World, text: str) -> None:
    """Print a warning on rank 0."""
    if world.is_main:
        print(f"warning: {text}", file=sys.stderr)


def print_warning_lines(lines: Iterable[str]) -> None:
    """Print finished lines to stderr."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def compute_on_rank0(world: World, action: Callable[[], T]) -> T:
    """Call `action` on rank 0 and return its result on every rank. All ranks must call this function."""
    result: T = broadcast_from_rank0(action() if world.is_main else None)
    return result


def compute_or_fail_together(world: World, action: Callable[[], T]) -> T:
    """`compute_on_rank0` for actions that read or write files.

    Raises:
        LiversegError: on every rank with the same message, if the action fails on rank 0.
    """

    def attempt() -> tuple[LiversegError | None, T | None]:
        try:
            return None, action()
        except LiversegError as error:
            return error, None
        except OSError as error:
            reason = error.strerror or error
            return RunFailed(f"{error.filename or 'the run'}: {reason}"), None

    problem, result = compute_on_rank0(world, attempt)
    if problem is not None:
        raise problem
    return result  # type: ignore[return-value]


def run_distributed(
    world: World,
    timeout_s: float,
    folder: Path,
    work: Callable[[HeartbeatMonitor], Result],
    on_failure: Callable[[HeartbeatMonitor, str], None] = lambda monitor, line: None,
) -> Result:
    """Connect the ranks and call `work` on each.

    The rank that failed first prints the reason. If that rank is lost, one that waits for it prints it. The traceback
    of each rank is written to `folder`/errors/.

    Args:
        timeout_s: seconds that a collective waits for a lost rank.
        on_failure: called on every rank with the reason, except for a mistake of the user.

    Returns:
        The result of `work`; on ranks that do not print the failure, a result with "error" and "exit_code".

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
    """Print why a case failed, while the other cases continue. An unexpected error also gets a crash report."""
    print(f"liverseg: {error}", file=sys.stderr, flush=True)
    cause = error.__cause__
    if cause is not None and not isinstance(cause, (LiversegError, OSError)):
        write_crash_report(folder, error, world.global_rank, -1, [name])
