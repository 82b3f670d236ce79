"""How torchrun's own process ends a job of `liverseg_dist` on Ctrl-C, SIGTERM or the hang-up of its
terminal.

torchrun starts the ranks, and it alone gets the signals of the terminal. Its own way is to pass the
signal on, to kill ranks that take longer than 30 s, and to end with a traceback and exit code 1
although the ranks have saved. Here it passes the signal on, waits for the ranks, and ends with
their exit code: 75 if all stopped on request. A second signal makes the ranks end at once.

torchrun imports this module through the entry point `torchrun.handlers`, with any --rdzv-backend
and with --standalone. It has an effect only in torchrun's own process, and only if the script that
it starts is `liverseg_dist`: all other jobs of the user are left as they are."""

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
"""After SIGTERM nobody is there to send a second signal; ranks that hang are killed after this
time."""
SECOND_PATIENCE_S = 5.0
"""Time for the ranks to end after a second signal, before they are killed."""
POLL_S = 0.1
TORCH_HANDLER = "_terminate_process_handler"
"""Name in torch of the function that it installs for the signals it handles."""

Handler = Callable[[int, FrameType | None], None]


def install_signal_handling(argv: Sequence[str]) -> None:
    """Take over signals and the end of this process, if `argv` is torchrun's command line for
    `liverseg_dist`."""
    torch_handler = getattr(elastic, TORCH_HANDLER, None)
    if not starts_liverseg(argv) or torch_handler is None:
        return
    guard_output_streams()
    handle_interrupts()  # until the ranks are started
    # torch installs the function of this name when it starts the ranks.
    setattr(elastic, TORCH_HANDLER, StopRanks(torch_handler))
    sys.excepthook = _end_without_traceback


def starts_liverseg(argv: Sequence[str]) -> bool:
    """Whether this is torchrun's command line, and the script or module that it starts is this
    project's."""
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
            next(words, None)  # the option's value
    return False


class StopRanks:
    """Signal handler of torchrun's process: passes the signal on, waits for the ranks, ends with
    their code."""

    def __init__(self, torch_handler: Handler) -> None:
        self._torch_handler = torch_handler
        self._hang_up_is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._first_s: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and self._hang_up_is_ignored:  # under nohup
            return
        ranks = _list_ranks()
        if not ranks:
            self._torch_handler(number, frame)
            return
        now = time.monotonic()
        if self._first_s is None:
            self._first_s = now
            patience_s = float("inf") if number == signal.SIGINT else TERMINATE_PATIENCE_S
            # Ranks are sessions of their own: the terminal's signal has not reached them.
            _send_signal(ranks, signal.Signals(number))
        elif now - self._first_s < SAME_SIGNAL_S:
            return
        else:
            patience_s = SECOND_PATIENCE_S
            _send_signal(ranks, signal.SIGINT)
            if not _wait_for(ranks, 2 * SAME_SIGNAL_S):
                # A busy rank may have read the first signal late and have taken this one for the same.
                _send_signal(ranks, signal.SIGINT)
        if not _wait_for(ranks, patience_s):
            _send_signal(ranks, signal.SIGKILL)
            _wait_for(ranks, SECOND_PATIENCE_S)
            write_line(
                f"ranks that did not stop within {patience_s:.0f} s were killed; the same line continues"
            )
            os._exit(EXIT_RESUMABLE)
        code = _common_code(ranks)
        if code != EXIT_DONE:
            raise SystemExit(code)
        # All ranks had finished their work: torchrun notices by itself.


def _list_ranks() -> list[int]:
    """Process ids of the ranks that this process has started and not yet collected."""
    found = []
    for listing in Path("/proc/self/task").glob("*/children"):
        for child in map(int, listing.read_text().split()):
            with suppress(OSError):
                if b"\0TORCHELASTIC_RUN_ID=" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                    found.append(child)
    return found


def _send_signal(ranks: Sequence[int], number: signal.Signals) -> None:
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.killpg(rank, number)


def _wait_for(ranks: Sequence[int], patience_s: float) -> bool:
    """Whether all ranks have ended in time. They stay zombies, as torch is to collect their exit
    codes itself."""
    end = time.monotonic() + patience_s
    while any(_exit_code(rank) is None for rank in ranks):
        if time.monotonic() > end:
            return False
        time.sleep(POLL_S)
    return True


def _exit_code(rank: int) -> int | None:
    """None while it runs; negative if a signal ended it."""
    try:
        ended = os.waitid(os.P_PID, rank, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # torch has collected it
        return EXIT_DONE
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _common_code(ranks: Sequence[int]) -> int:
    """75 if a rank stopped on request and none failed; a rank that had not begun yet was ended by
    the signal itself."""
    codes = {_exit_code(rank) for rank in ranks}
    requests = {-signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP, EXIT_RESUMABLE}
    if codes == {EXIT_DONE}:
        return EXIT_DONE
    return EXIT_RESUMABLE if codes <= requests | {EXIT_DONE} else EXIT_FAILED


def _end_without_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """`sys.excepthook`. Ranks that stopped on request have said so; torch takes their exit code for
    a failure."""
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
