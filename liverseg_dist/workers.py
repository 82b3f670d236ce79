"""What worker processes need of the machine: a short folder for sockets, shared memory that can be
written.

Used by every pool of processes (conversion, scoring, phantom).
"""

import multiprocessing.process
import multiprocessing.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from liverseg_dist.errors import UserError

MOST_SOCKET_PATH = 107
"""Bytes of a Unix socket's path on Linux (sun_path, without the final zero)."""
SOCKET_NAME = "/pymp-xxxxxxxx/listener-xxxxxxxx"
SHORT_FOLDER = "/tmp"  # mkdtemp makes a folder of mode 0700 in it  # nosec B108


@contextmanager
def prepared_for_workers() -> Iterator[None]:
    """Enter before a pool of processes is made.

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
    yield


def _choose_socket_folder() -> None:
    """multiprocessing puts sockets into TMPDIR; where that leaves them no room, into /tmp."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:
        raise UserError(
            "no folder for temporary files can be written; set TMPDIR to one that can"
        ) from None
    if len(os.fsencode(folder)) + len(SOCKET_NAME) <= MOST_SOCKET_PATH:
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
