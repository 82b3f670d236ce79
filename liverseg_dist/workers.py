"""Pools of worker processes on one machine, for conversion, scoring and phantoms.

Workers ignore the signals of the terminal, which their parent handles, and exit when the parent
exits. Before a pool starts, its requirements (a folder for sockets, shared memory) are checked.
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
"""Maximum length of a Unix socket's path on Linux (sun_path without the final zero)."""
SOCKET_NAME = "/pymp-xxxxxxxx/listener-xxxxxxxx"
SHORT_FOLDER = "/tmp"  # mkdtemp creates a folder of mode 0700 in it  # nosec B108


def prepare_for_workers() -> None:
    """Check the requirements of a pool of processes, and choose a folder for its sockets.

    Raises:
        UserError: No folder for temporary files or sockets, or /dev/shm cannot be written; names
            the remedy.
    """
    _choose_socket_folder()
    try:
        # Every pool has semaphores of this kind.
        multiprocessing.get_context("spawn").Lock()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"/dev/shm: worker processes need it for semaphores ({reason}); mount it writable "
            "(in a container: e.g. docker run --shm-size=1g)"
        ) from None


def _choose_socket_folder() -> None:
    """Let multiprocessing use /tmp for its sockets if the path of TMPDIR is too long for them."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:
        raise UserError(
            "no folder for temporary files is writable; set TMPDIR to a writable folder"
        ) from None
    if len(os.fsencode(folder)) + len(SOCKET_NAME) <= MAX_SOCKET_PATH_BYTES:
        return
    process = multiprocessing.process.current_process()
    if process._config.get("tempdir") is not None:  # type: ignore[attr-defined]
        # An earlier call, or the parent process, has chosen a folder.
        return
    before = tempfile.tempdir
    try:
        tempfile.tempdir = SHORT_FOLDER
        # Creates the folder; multiprocessing then uses it for all sockets.
        multiprocessing.util.get_temp_dir()
    except OSError as error:
        raise UserError(
            f"TMPDIR={folder}: too long for Unix sockets, and {SHORT_FOLDER} cannot be used "
            f"({error.strerror}); set TMPDIR to a folder with a short path"
        ) from None
    finally:
        tempfile.tempdir = before


def begin_worker() -> None:
    """Initialise a worker process: ignore the terminal's signals, and exit with the parent."""
    guard_output_streams()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    # Not `sys.exit`, which would only end this thread.
    os._exit(1)


@contextmanager
def worker_pool(workers: int, context: BaseContext) -> Iterator[ProcessPoolExecutor]:
    """Run a pool of processes. An error or an interrupt ends it without waiting for its work."""
    prepare_for_workers()
    with ProcessPoolExecutor(workers, context, initializer=begin_worker) as pool:
        try:
            yield pool
        except BaseException:
            # Cancels the waiting tasks; those in progress end with their processes.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


@contextmanager
def terminal_signals_blocked() -> Iterator[None]:
    """Block the signals of the terminal while processes are started.

    The processes inherit the mask, so Ctrl-C cannot end one before `begin_worker` runs.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
