"""Standard output and error streams whose writes never fail.

A pipe whose reader has ended (`| head`), a closed terminal, a closed descriptor (`>&-`) or a full
disk must not end the work. Every program of this project first calls `guard_output_streams`. From
then on, writing to `sys.stdout` and `sys.stderr` never raises: output that cannot be written is
dropped, and the exit code is that of the work. Errors of other pipes and sockets are still raised.
"""

import errno
import io
import os
import select
import sys
from contextlib import suppress

READER_LOST = frozenset(
    {errno.EPIPE, errno.EBADF, errno.ENXIO, errno.ENOTCONN, errno.ECONNRESET, errno.ESHUTDOWN}
)
"""Error codes of a write without a reader. A closed terminal gives EIO instead."""
STDOUT, STDERR = 1, 2


class OutputDescriptor(io.RawIOBase):
    """Raw layer of a standard stream. It writes all data, and drops data that cannot be written."""

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__()
        self.name = name
        self.mode = "wb"
        self.failure = ""
        """Reason if data was dropped although there may be a reader, for example a full disk."""
        self._descriptor = descriptor
        self._is_terminal = os.isatty(descriptor)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: object) -> int:
        """Write `data`, bytes or a buffer of them. Returns their number, even if they were
        dropped."""
        rest = memoryview(data).cast("B")  # type: ignore[arg-type]
        total = len(rest)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                # Another program has made the shared pipe non-blocking: wait until it is writable.
                waiting = select.poll()
                waiting.register(self._descriptor, select.POLLOUT)
                waiting.poll()
            except OSError as error:
                self._drop(error)
                break
        return total

    def _drop(self, error: OSError) -> None:
        closed_terminal = error.errno == errno.EIO and self._is_terminal
        if error.errno in READER_LOST or closed_terminal:
            # Native libraries and child processes use the same descriptor and would fail, too.
            _connect_to_null(self._descriptor)
        else:
            self.failure = error.strerror or str(error)


class DiscardedOutput(io.RawIOBase):
    """Raw layer of a stream that drops everything."""

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        return memoryview(data).nbytes  # type: ignore[arg-type]


_guarded: dict[int, OutputDescriptor] = {}
_replaced: list[object] = []
"""The interpreter's own streams. A reference is kept because their destructors would write to the
descriptors at an arbitrary time."""


def guard_output_streams() -> None:
    """Replace `sys.stdout` and `sys.stderr` by streams whose writes never raise. Call it at
    start-up.

    Characters that the encoding cannot represent are written as backslash escapes. Closed
    descriptors 0 to 2 are connected to /dev/null: otherwise the next opened file would get the same
    number and receive the output. Streams that do not use the descriptors (as in tests) are not
    replaced."""
    _occupy_closed_descriptors()
    for name, descriptor in (("stdout", STDOUT), ("stderr", STDERR)):
        if descriptor in _guarded:
            continue
        before = getattr(sys, name)
        if before is not None and not _writes_to(before, descriptor):
            continue
        if before is not None:
            _flush_or_drop(before, descriptor)
            _replaced.append(before)
        raw = _guarded[descriptor] = OutputDescriptor(descriptor, f"<{name}>")
        # With `python -u`.
        unbuffered = getattr(before, "write_through", False)
        stream = io.TextIOWrapper(
            raw if unbuffered else io.BufferedWriter(raw),
            encoding=getattr(before, "encoding", None) or "utf-8",
            errors="backslashreplace",
            line_buffering=getattr(before, "line_buffering", False) or name == "stderr",
            write_through=unbuffered,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def discard_stdout() -> None:
    """Drop all text that is written to `sys.stdout` from now on, also by libraries.

    The descriptor stays open, because child processes may use it.
    """
    sys.stdout.flush()
    # Else the destructor of the stream would close the descriptor.
    _replaced.append(sys.stdout)
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(DiscardedOutput()), encoding="utf-8")


def output_failure() -> str:
    """Flush standard output, and return why part of it was lost; empty if nothing was.

    A reader that has ended is not a failure, because it does not need the output.
    """
    sys.stdout.flush()
    return _guarded[STDOUT].failure if STDOUT in _guarded else ""


def print_checked(text: str) -> str:
    """Print a line for another program. Returns why it could not be written; empty on success."""
    output_failure()
    raw = _guarded.get(STDOUT)
    earlier = raw.failure if raw else ""
    if raw:
        raw.failure = ""
    print(text, flush=True)
    failure = output_failure()
    if raw:
        raw.failure = failure or earlier
    return failure


def _writes_to(stream: object, descriptor: int) -> bool:
    try:
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() == descriptor
    except (OSError, ValueError):
        return False


def _flush_or_drop(stream: io.TextIOWrapper, descriptor: int) -> None:
    try:
        stream.flush()
    except OSError:
        _connect_to_null(descriptor)
        with suppress(OSError):
            stream.flush()


def _occupy_closed_descriptors() -> None:
    for descriptor in (0, STDOUT, STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            _connect_to_null(descriptor)


def _connect_to_null(descriptor: int) -> None:
    # Without a free descriptor, the stream is not changed and drops all output.
    with suppress(OSError):
        # The lowest free number, which may be the descriptor itself.
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
        os.set_inheritable(descriptor, True)
