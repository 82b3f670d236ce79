"""One input, one verdict: accepted, refused in one clear line, or one of the four failures.

traceback   anything but the family of `LiversegError`, or a message of several lines
hang        more than `PATIENCE_S` of CPU time (the parent process sees what sleeps for longer)
memory      more than `MOST_GROWTH_MIB` resident for an input of some KiB, or the wall of RLIMIT_AS
wrong       accepted, but an independent reader reads something else in the same bytes
"""

import gc
import resource
import signal
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from liverseg_dist.errors import LiversegError

PATIENCE_S = 15.0
MOST_GROWTH_MIB = 300
ROOM_MIB = 1500
FAILURES = ("traceback", "hang", "memory", "wrong")


class Wrong(AssertionError):
    """Two readers of the same bytes differ."""


class Hang(BaseException):
    """Raised by the alarm; no handler of the code under test catches it."""


@dataclass(frozen=True)
class Verdict:
    outcome: str
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.outcome in FAILURES


def wall() -> None:
    """No more address space for this process than it has now and `ROOM_MIB`."""
    size = (_status("VmSize") + (ROOM_MIB << 10)) << 10
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def judge(check: Callable[[Path], None], case: Path) -> Verdict:
    """Run `check`, which returns when the input was accepted and raises what the code under test raises."""
    before = _forget_peak()
    old = signal.signal(signal.SIGPROF, _ring)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdict = _verdict(check, case)
    except Hang as error:
        verdict = Verdict("hang", _where(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
    grown = (_status("VmHWM") - before) >> 10
    if not verdict.failed and grown > MOST_GROWTH_MIB:
        gc.collect()
        return Verdict("memory", f"{grown} MiB; {verdict.outcome}: {verdict.detail}")
    return verdict


def _verdict(check: Callable[[Path], None], case: Path) -> Verdict:
    try:
        check(case)
    except LiversegError as error:
        text = str(error)
        if getattr(error, "code", "") == "too_large":
            return Verdict("memory", text)
        if "\n" in text or not text.isprintable() or len(text) > 2000:
            return Verdict("traceback", f"no clear line ({len(text)} characters): {text[:300]!r}")
        return Verdict("refused", text)
    except Wrong as error:
        return Verdict("wrong", str(error)[:1000])
    except MemoryError as error:
        return Verdict("memory", _where(error))
    except Exception as error:  # what else it raises is what is looked for
        return Verdict("traceback", _where(error))
    return Verdict("accepted")


def _ring(*_: object) -> None:
    raise Hang


def _where(error: BaseException) -> str:
    """The kind of error, its words, and the last lines of ours that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        f for f in frames if "/liverseg_dist/" in f.filename or "/launch/" in f.filename
    ] or frames[-1:]
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(ours[-3:]))
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} @ {places}"


def _status(name: str) -> int:
    """KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return 0


def _forget_peak() -> int:
    """Make VmHWM the resident memory of now, and tell it, KiB."""
    with suppress(OSError):  # a container may forbid it: then the peak only grows
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmHWM")
