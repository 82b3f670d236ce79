"""Pools of processes: where their sockets are, and how they end."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from liverseg_dist.workers import (
    MAX_SOCKET_PATH_BYTES,
    prepare_for_workers,
    terminal_signals_blocked,
    worker_pool,
)

SOCKET_FOLDER = """
import multiprocessing.util
from liverseg_dist.errors import UserError
from liverseg_dist.workers import prepare_for_workers
try:
    prepare_for_workers()
    print(multiprocessing.util.get_temp_dir())
except UserError as error:
    print("refused:", error)
"""


def ask_for_socket_folder(tmpdir: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SOCKET_FOLDER],
        env={**os.environ, "TMPDIR": str(tmpdir)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_a_long_tmpdir_is_replaced_for_sockets_only(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 60) / ("y" * 60)
    folder.mkdir(parents=True)
    assert len(os.fsencode(folder)) > MAX_SOCKET_PATH_BYTES
    found = ask_for_socket_folder(folder)
    assert found.startswith("/tmp/pymp-")
    assert list(folder.iterdir()) == []


def test_a_short_tmpdir_is_used() -> None:
    found = ask_for_socket_folder(Path("/var/tmp"))
    assert found.startswith("/var/tmp/pymp-")


def test_without_a_writable_folder_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_none() -> str:
        raise FileNotFoundError("no usable temporary directory")

    # Root can write to every folder, so the search itself is replaced.
    monkeypatch.setattr("liverseg_dist.workers.tempfile.gettempdir", find_none)
    with pytest.raises(Exception, match="set TMPDIR to a writable folder"):
        prepare_for_workers()


def test_signals_of_the_terminal_are_blocked_inside_only() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with terminal_signals_blocked():
        inside = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert {signal.SIGINT, signal.SIGHUP} <= inside
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def fail_while_a_worker_is_busy() -> None:
    with worker_pool(1, multiprocessing.get_context("spawn")) as pool:
        # Both last longer than the test may take; the second one waits for the first.
        busy = pool.submit(time.sleep, 100)
        pool.submit(time.sleep, 100)
        while not busy.running():
            time.sleep(0.01)
        raise KeyError("of the caller")


def test_an_error_ends_the_pool_without_waiting_for_its_work() -> None:
    begun = time.monotonic()
    with pytest.raises(KeyError, match="of the caller"):
        fail_while_a_worker_is_busy()
    # SIGTERM has been sent; the process needs a moment to end.
    while multiprocessing.active_children() and time.monotonic() < begun + 60:
        time.sleep(0.01)
    assert time.monotonic() - begun < 60


PARENT = """
import multiprocessing, os, time
from liverseg_dist.workers import worker_pool
if __name__ == "__main__":
    with worker_pool(1, multiprocessing.get_context("spawn")) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 100)
        time.sleep(100)
"""


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    process.kill()
    process.wait(20)
    process.stdout.close()
    end = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and time.monotonic() < end:
        state = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":  # ended; nobody in this container has asked for its exit code
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{worker}").exists()
