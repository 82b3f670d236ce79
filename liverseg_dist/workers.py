"""Pools of worker processes on one machine: used by conversion, scoring and phantoms.

Workers ignore the signals of a terminal, which are for their parent, and end when the parent ends. Before a pool starts,
the folder for sockets and the shared memory that it needs are checked.
"""

import multiprocessing
import multiprocessing.process
import multiprocessing.util
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext

from liverseg_dist.errors import UserError
from liverseg_dist.streams import guard_output_streams

MAX_SOCKET_PATH_BYTES = 107
"""Bytes of a Unix socket's path on Linux (sun_path, without the final zero)."""
SOCKET_NAME = "/pymp-xxxxxxxx/listener-xxxxxxxx"
SHORT_FOLDER = "/tmp"  # mkdtemp makes a folder of mode 0700 in it  # nosec B108


def prepare_for_workers() -> None:
    """Check what a pool of processes needs of this machine, and choose a folder for its sockets.

    Raises:
        UserError: No folder for temporary files or sockets, or /dev/shm cannot be written; names
            the remedy.
    """
    _choose_socket_folder()
    try:
        multiprocessing.get_context("spawn").Lock()  # a semaphore, as every pool has
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"/dev/shm: worker processes need it for semaphores ({reason}); mount it writable "
            "(in a container: e.g. docker run --shm-size=1g)"
        ) from None


def _choose_socket_folder() -> None:
    """multiprocessing puts sockets into TMPDIR; where that leaves them no room, into /tmp."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:
        raise UserError(
            "no folder for temporary files can be written; set TMPDIR to one that can"
        ) from None
    if len(os.fsencode(folder)) + len(SOCKET_NAME) <= MAX_SOCKET_PATH_BYTES:
        return
    if multiprocessing.process.current_process()._config.get("tempdir") is not None:  # type: ignore[attr-defined]
        return  # chosen before, by this function or by the process that started this one
    before = tempfile.tempdir
    try:
        tempfile.tempdir = SHORT_FOLDER
        multiprocessing.util.get_temp_dir()  # makes the folder, and is remembered for all sockets
    except OSError as error:
        raise UserError(
            f"TMPDIR={folder}: too long for Unix sockets, and {SHORT_FOLDER} cannot be used ({error.strerror}); "
            "set TMPDIR to a folder with a short path"
        ) from None
    finally:
        tempfile.tempdir = before


def begin_worker() -> None:
    """Start of a worker process: signals of the terminal are for its parent, and it ends when the parent ends."""
    guard_output_streams()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


@contextmanager
def worker_pool(workers: int, context: BaseContext) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that an error or an interrupt ends at once, without waiting for the work in progress."""
    prepare_for_workers()
    with ProcessPoolExecutor(workers, context, initializer=begin_worker) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


@contextmanager
def terminal_signals_blocked() -> Iterator[None]:
    """While processes are started: they inherit the mask, so Ctrl-C cannot reach one before `begin_worker` runs."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
