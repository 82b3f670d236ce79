"""Ctrl-C and hang-up in real processes: exit code 75, one line, never a traceback."""

import os
import select
import signal
import subprocess
import sys

import pytest

from liverseg_dist.errors import EXIT_RESUMABLE
from liverseg_dist.interrupts import INTERRUPTED_MESSAGE

BUSY = """
import sys, time
from liverseg_dist.interrupts import handle_interrupts
handler = handle_interrupts()
handler.work_has_begun = sys.argv[1] == "working"
try:
    print("ready", flush=True)
    time.sleep(30)
except KeyboardInterrupt as interrupt:
    print("cleaning up after", interrupt, flush=True)
    time.sleep(30)
"""


def restore_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(state: str, **environment: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    kept.pop("RANK", None)
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, state],
        env={**kept, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell may have started the tests with these signals ignored.
        preexec_fn=restore_signals,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_during_imports_a_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    process = start("importing")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == EXIT_RESUMABLE
    assert out == ""
    assert err == f"liverseg: {INTERRUPTED_MESSAGE}\n"


def test_a_second_signal_ends_the_clean_up() -> None:
    process = start("working")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "cleaning up after SIGINT\n"
    # The terminal and the launcher may both deliver one Ctrl-C: this one still belongs to it.
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.7)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == EXIT_RESUMABLE
    assert err == f"liverseg: ended at once by a second signal; {INTERRUPTED_MESSAGE}\n"


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_only_the_first_rank_writes_the_line(variable: str) -> None:
    process = start("importing", **{variable: "3"})
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (EXIT_RESUMABLE, "")


def test_an_ignored_hang_up_stays_ignored() -> None:
    """`nohup` starts the program in this way."""
    code = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN);"
        "from liverseg_dist.interrupts import handle_interrupts; handle_interrupts();"
        "assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_closed_stderr_is_no_error() -> None:
    process = start("importing")
    assert process.stderr is not None
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == EXIT_RESUMABLE
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 5)[0], "the stream is at its end"
    process.stdout.close()
