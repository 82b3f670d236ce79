"""Starting, joining and leaving Ray: no usage pings, loopback only, a temp folder per user, nothing left behind."""

import contextlib
import getpass
import importlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray reads these when it is imported
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # our own lines tell more
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray

from liverseg_dist.errors import LiversegError, RunFailed, StopRequested, UserError

from .process_guard import guard_processes

OBJECT_STORE_BYTES = 100 << 20
"""Only scores travel through Ray."""
AGAIN = "all is kept, run the same line again to continue"
LOOKED_AFTER_S = 5.0
LEAVING_S = 60.0
"""How long Ray may take to let go of us, once there is a reason; and again to shut down."""
Check = Callable[[], str]
"""Why Ray must be given up, or ''."""


class _Stop(BaseException):
    """A signal, by name. No Exception: Tune would take those for a trial's failure."""


@contextlib.contextmanager
def ray_session(
    address: str | None,
    cpus: int,
    dashboard: bool,
    stands_still: Check | None = None,
    last_words: Callable[[LiversegError], None] = print,
) -> Iterator[str]:
    """A local Ray of our own, or the cluster at `address`. Yields the dashboard's address, or ''.

    SIGTERM and Ctrl-C raise `StopRequested` in the block; the loss of all nodes, or what `stands_still` tells (it is
    asked every few seconds), `RunFailed`. However it is left, no Ray process of ours stays. Where Ray does not let go
    of the block, or does not shut down, in time, `last_words` gets the error, and the process ends.
    """
    with guard_processes() as farewell:
        session, stop = "", _StopOnSignal()

        def leave_at_once() -> None:
            error = stop.error or RunFailed(f"Ray does not shut down; {AGAIN}")
            farewell()
            last_words(error)
            if session:
                shutil.rmtree(session, ignore_errors=True)
            os._exit(error.exit_code)  # the guard ends what is left of Ray

        checks = (_nodes_lost, stands_still) if stands_still else (_nodes_lost,)
        try:
            with _handlers(stop):
                context = _join(address) if address else _start(cpus, dashboard)
                session = "" if address else str(context.address_info.get("session_dir") or "")
                with (
                    _handlers(stop),
                    _watching(stop, checks, leave_at_once),
                ):  # Ray has put its own on SIGTERM
                    yield str(context.dashboard_url or "")
        except BaseException:  # raised inside Ray's compiled code, ours arrives as a SystemError
            if stop.error:
                raise stop.error from None
            raise
        finally:
            with (
                _handlers(signal.SIG_IGN),
                _within(LEAVING_S, leave_at_once),
            ):  # a second signal must leave nothing
                ray.shutdown()
                if session:
                    shutil.rmtree(session, ignore_errors=True)


LONGEST_FOLDER = 107 - len("/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store")
"""A Unix socket's path has 107 characters at most."""


def temp_folder(inside: str = "") -> Path:
    """Per user; short, as Unix sockets lie in it (or in its folder `inside`): in /tmp where TMPDIR leaves them no room.

    Raises `UserError` where others have been there before.
    """
    folder = Path(tempfile.gettempdir()) / f"ray-{getpass.getuser()}"
    if len(str(folder / inside)) > LONGEST_FOLDER:
        folder = Path("/tmp") / folder.name  # of mode 0700, and nobody else's: see below  # nosec B108
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder}: belongs to another user; set TMPDIR to a folder of yours")
    return folder / inside


def write_token(file: Path) -> None:
    """A token for Ray in a new file that nobody else can read. Raises `FileExistsError`."""
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(secrets.token_hex(32))


def asking_for(token: Path) -> dict[str, str]:
    """The environment of a Ray that asks for this token, and of whoever joins it."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def own_token() -> Path:
    """This user's file with Ray's token, made when missing; nobody else can read it."""
    file = temp_folder() / "token"
    if not file.exists():
        part = file.with_name(f"token.{os.getpid()}")
        part.unlink(missing_ok=True)
        write_token(part)
        with contextlib.suppress(FileExistsError):  # another sweep of ours was quicker
            os.link(part, file)
        part.unlink()
    return file


def token_file() -> str:
    """Where the token lies that this process's Ray asks for; '' without one."""
    return (
        os.environ.get("RAY_AUTH_TOKEN_PATH", "")
        if os.environ.get("RAY_AUTH_MODE") == "token"
        else ""
    )


def nodes_left() -> bool:
    """Whether any node of the cluster that this process has joined is alive."""
    return any(node["Alive"] for node in ray.nodes())


def dashboard_installed() -> bool:
    """Whether `ray[default]` is there; `ray[tune]` alone has no dashboard."""
    try:
        importlib.import_module("ray.dashboard.optional_deps")
    except ImportError:
        return False
    return True


def _start(cpus: int, dashboard: bool) -> Any:
    try:
        return ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=dashboard and dashboard_installed(),
            dashboard_host="127.0.0.1",
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(temp_folder()),
            _node_ip_address="127.0.0.1",
        )
    except Exception as error:  # a node that is too slow to start raises a bare Exception
        raise RunFailed(f"Ray did not start: {' '.join(str(error).split())[:300]}") from None


def _join(address: str) -> Any:
    try:
        return ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"--address {address}: no Ray cluster answers there ({said})") from None


def _nodes_lost() -> str:
    """Tune waits for resources for ever when the last node has gone."""
    return "" if nodes_left() else "no node of Ray's answers any more"


@contextlib.contextmanager
def _watching(
    stop: "_StopOnSignal", checks: Sequence[Check], leave_at_once: Callable[[], None]
) -> Iterator[None]:
    """Ends the main thread's wait when a check has a reason; the process, when Ray does not let go of that thread.

    A thread for each check, as one that asks Ray may wait for ever.
    """
    main, done, deciding = threading.main_thread().ident, threading.Event(), threading.Lock()

    def watch(check: Check) -> None:
        reason = ""
        while not reason:
            if done.wait(LOOKED_AFTER_S):
                return
            with contextlib.suppress(
                Exception
            ):  # Ray itself ends a driver whose control process is gone
                reason = check()
        with deciding:  # no signal once the block is left, and no second one
            if stop.reason or stop.signal_name or done.is_set():
                return
            stop.reason = reason
            signal.pthread_kill(main or 0, signal.SIGUSR2)
        if not done.wait(LEAVING_S):
            leave_at_once()

    for check in checks:
        threading.Thread(target=watch, args=(check,), daemon=True).start()
    try:
        yield
    finally:
        with deciding:
            done.set()


@contextlib.contextmanager
def _within(seconds: float, otherwise: Callable[[], None]) -> Iterator[None]:
    timer = threading.Timer(seconds, otherwise)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _handlers(handler: object) -> Iterator[None]:
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2]
    if (
        signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    ):  # under nohup a closed terminal does not matter
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class _StopOnSignal:
    """A signal handler that ends the block it stands for, and remembers why."""

    def __init__(self) -> None:
        self.signal_name = ""
        self.reason = ""
        """Why Ray was given up."""

    @property
    def error(self) -> LiversegError | None:
        if self.reason:
            return RunFailed(f"{self.reason}; {AGAIN}")
        if self.signal_name:
            return StopRequested(
                f"stopped by {self.signal_name}; run the same line again to continue"
            )
        return None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        raise _Stop(self.signal_name)
