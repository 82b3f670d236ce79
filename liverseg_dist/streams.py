"""Standard output and error that survive the loss of their reader.

A pipe whose reader has ended (`| head`), a closed terminal, a closed descriptor (`>&-`) or a full disk must not decide
what becomes of the work. Every program of this project calls `guard_output_streams` before anything else: from then on
writing to `sys.stdout` and `sys.stderr` never raises. What cannot be written is dropped, and the exit code is that of
the work. An error of any other pipe or socket is still raised where it happens.
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
"""Errors of a write that say that no reader is left. A terminal that was closed gives EIO."""
STDOUT, STDERR = 1, 2


class OutputDescriptor(io.RawIOBase):
    """The raw layer of a standard stream: writes all of the data, or drops what cannot be written."""

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__()
        self.name = name
        self.mode = "wb"
        self.failure = ""
        """Why data was dropped although a reader may be left, for example a full disk. Empty if none was."""
        self._descriptor = descriptor
        self._is_terminal = os.isatty(descriptor)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: object) -> int:
        """Write all of `data`, bytes or a buffer of them. Returns their number, also when they were dropped."""
        rest = memoryview(data).cast("B")  # type: ignore[arg-type]
        total = len(rest)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                # Another program has made the shared pipe non-blocking; wait as a blocking write does.
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
            # Native libraries and child processes write to the same descriptor and would fail, too.
            _connect_to_null(self._descriptor)
        else:
            self.failure = error.strerror or str(error)


_guarded: dict[int, OutputDescriptor] = {}
_replaced: list[object] = []
"""The interpreter's own streams, kept so that their destructors do not write at an arbitrary moment."""


def guard_output_streams() -> None:
    """Replace `sys.stdout` and `sys.stderr` by streams whose writes never raise. To be called once, at the start.

    Characters that the encoding lacks are written as backslash escapes. Closed descriptors 0 to 2 are connected to
    /dev/null; otherwise the next file or socket that is opened would get the number and receive the output. Streams
    that are not the process's own descriptors (a test's capture) stay as they are.
    """
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
        unbuffered = getattr(before, "write_through", False)  # python -u
        stream = io.TextIOWrapper(
            raw if unbuffered else io.BufferedWriter(raw),
            encoding=getattr(before, "encoding", None) or "utf-8",
            errors="backslashreplace",
            line_buffering=getattr(before, "line_buffering", False) or name == "stderr",
            write_through=unbuffered,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def output_failure() -> str:
    """Why part of standard output was lost although it may have a reader (a full disk); empty if nothing was.

    Everything printed before is flushed first. A lost reader is no failure: the output has no use.
    """
    sys.stdout.flush()
    return _guarded[STDOUT].failure if STDOUT in _guarded else ""


def print_checked(text: str) -> str:
    """Print a line that a program will read. Returns why it could not be written, or an empty string."""
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
    with suppress(
        OSError
    ):  # without a free descriptor the stream stays as it is, and drops what is written
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
        os.set_inheritable(descriptor, True)
