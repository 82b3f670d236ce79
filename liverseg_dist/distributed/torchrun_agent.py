"""Signal handling in torchrun's own process, for jobs of `liverseg_dist`.

Only torchrun receives the signals of the terminal. By default it forwards a signal, kills ranks
that take longer than 30 s, and exits with a traceback and code 1 although the ranks have saved.
With this module it forwards the signal, waits for the ranks, and exits with their code: 75 if all
stopped on request. A second signal makes the ranks exit at once.

torchrun imports this module through the entry point `torchrun.handlers`, with any --rdzv-backend
and with --standalone. It has an effect only in torchrun's own process, and only if torchrun starts
`liverseg_dist`: other jobs are not affected.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType

from torch.distributed.elastic.multiprocessing import api as elastic

from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE
from liverseg_dist.interrupts import SAME_SIGNAL_S, handle_interrupts, write_line
from liverseg_dist.streams import guard_output_streams

MODULE_NAME = "liverseg_dist"
TORCHRUN_PROGRAMS = ("torchrun", "torch/distributed/run.py", "torch/distributed/launch.py")
OPTIONS_WITHOUT_VALUE = (
    "-m", "--module", "--standalone", "--no-python", "--no_python", "--run-path", "--run_path",
    "--virtual-local-rank", "--virtual_local_rank",
)  # fmt: skip
"""Options of torchrun without a value."""
TERMINATE_PATIENCE_S = 300.0
"""After SIGTERM, usually sent by a program, no second signal follows: ranks that hang are
killed."""
SECOND_PATIENCE_S = 5.0
"""Time for the ranks to end after a second signal, before they are killed."""
POLL_S = 0.1
TORCH_HANDLER = "_terminate_process_handler"
"""Name of torch's own signal handler."""

Handler = Callable[[int, FrameType | None], None]


def install_signal_handling(argv: Sequence[str]) -> None:
    """Install the signal handling in torchrun's process.

    Args:
        argv: command line of this process. Without effect unless it is torchrun's, for
            `liverseg_dist`.
    """
    torch_handler = getattr(elastic, TORCH_HANDLER, None)
    if not starts_liverseg(argv) or torch_handler is None:
        return
    guard_output_streams()
    # In effect until torchrun has started the ranks.
    handle_interrupts()
    # torch looks this name up when it starts the ranks, and installs the function it finds.
    setattr(elastic, TORCH_HANDLER, StopRanks(torch_handler))
    sys.excepthook = _end_without_traceback


def starts_liverseg(argv: Sequence[str]) -> bool:
    """Return whether `argv` is torchrun's command line for a script or module of this project."""
    if not argv or not argv[0].endswith(TORCHRUN_PROGRAMS):
        return False
    options: set[str] = set()
    words = iter(argv[1:])
    for word in words:
        if not word.startswith("-"):
            is_module = bool(options & {"-m", "--module"})
            return word == MODULE_NAME if is_module else Path(word).name == "liverseg"
        options.add(word)
        if "=" not in word and word not in OPTIONS_WITHOUT_VALUE:
            # Skip the value of the option.
            next(words, None)
    return False


class StopRanks:
    """Signal handler that forwards a signal to the ranks, waits for them, and exits with their
    code."""

    def __init__(self, torch_handler: Handler) -> None:
        self._torch_handler = torch_handler
        self._hang_up_is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._first_s: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # Under nohup.
        if number == signal.SIGHUP and self._hang_up_is_ignored:
            return
        ranks = _list_ranks()
        if not ranks:
            self._torch_handler(number, frame)
            return
        now = time.monotonic()
        if self._first_s is None:
            self._first_s = now
            patience_s = float("inf") if number == signal.SIGINT else TERMINATE_PATIENCE_S
            # Each rank is in its own session, so the terminal's signal has not reached it.
            _send_signal(ranks, signal.Signals(number))
        elif now - self._first_s < SAME_SIGNAL_S:
            return
        else:
            patience_s = SECOND_PATIENCE_S
            _send_signal(ranks, signal.SIGINT)
            if not _wait_for(ranks, 2 * SAME_SIGNAL_S):
                # A busy rank may have handled the first signal late and dropped this one.
                _send_signal(ranks, signal.SIGINT)
        if not _wait_for(ranks, patience_s):
            _send_signal(ranks, signal.SIGKILL)
            _wait_for(ranks, SECOND_PATIENCE_S)
            write_line(
                f"ranks that did not stop within {patience_s:.0f} s were killed; the same line "
                "continues"
            )
            os._exit(EXIT_RESUMABLE)
        code = _common_code(ranks)
        if code != EXIT_DONE:
            raise SystemExit(code)
        # All ranks have finished their work: torchrun then exits by itself.


def _list_ranks() -> list[int]:
    """Return the process ids of the ranks that this process has started and not yet waited for."""
    found = []
    # torchrun may start ranks from any of its threads.
    for listing in Path("/proc/self/task").glob("*/children"):
        for child in map(int, listing.read_text().split()):
            with suppress(OSError):
                # Other children, such as resource trackers, do not have this variable.
                if b"\0TORCHELASTIC_RUN_ID=" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                    found.append(child)
    return found


def _send_signal(ranks: Sequence[int], number: signal.Signals) -> None:
    for rank in ranks:
        with suppress(ProcessLookupError):
            # Each rank leads a process group that contains its worker processes.
            os.killpg(rank, number)


def _wait_for(ranks: Sequence[int], patience_s: float) -> bool:
    """Wait for the ranks. Returns whether all have exited in time.

    They remain zombies, so that torch can still read their exit codes.
    """
    end = time.monotonic() + patience_s
    while any(_exit_code(rank) is None for rank in ranks):
        if time.monotonic() > end:
            return False
        time.sleep(POLL_S)
    return True


def _exit_code(rank: int) -> int | None:
    """Return a rank's exit code: None while it runs, negative if a signal ended it."""
    try:
        ended = os.waitid(os.P_PID, rank, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    # torch has read its exit code already.
    except ChildProcessError:
        return EXIT_DONE
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _common_code(ranks: Sequence[int]) -> int:
    """Return the exit code of the job: 75 if a rank stopped on request and none failed.

    The signal itself ends a rank that has not installed its handler yet.
    """
    codes = {_exit_code(rank) for rank in ranks}
    requests = {-signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP, EXIT_RESUMABLE}
    if codes == {EXIT_DONE}:
        return EXIT_DONE
    return EXIT_RESUMABLE if codes <= requests | {EXIT_DONE} else EXIT_FAILED


def _end_without_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """`sys.excepthook` that exits with 75 if all ranks stopped on request.

    torch treats exit code 75 as a failure; the ranks have printed their message already.
    """
    failures = getattr(error, "failures", None)
    codes = (
        {failure.exitcode for failure in failures.values()} if isinstance(failures, dict) else set()
    )
    if codes != {EXIT_RESUMABLE}:
        sys.__excepthook__(kind, error, trace)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_RESUMABLE)
